"""Files that are whole or untouched, whoever writes them and however full the disk is."""

import errno
import os

import pytest

from cycleqd_jax import atomic
from cycleqd_jax.atomic import NoSpaceError, atomic_file, explain_no_space, write_text_atomic


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "note.txt"
    write_text_atomic(path, "old")

    def half_a_write():
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        half_a_write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["note.txt"]


def test_a_full_disk_names_the_file_and_the_free_bytes(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_text_atomic(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(NoSpaceError, match=r"summary\.json: [\d,]+ bytes are free") as caught:
        write_text_atomic(path, "new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_full_disk_is_recognised_in_causes_groups_and_text(tmp_path):
    full = OSError(errno.EDQUOT, "over quota")
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = full
    for error in (
        full,
        wrapped,
        ExceptionGroup("several", [KeyError("x"), full]),
        ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']"),
    ):
        with pytest.raises(NoSpaceError), explain_no_space(tmp_path / "not" / "there"):
            raise error
    with pytest.raises(KeyError), explain_no_space(tmp_path):
        raise KeyError("other errors pass through")


def test_two_writers_at_a_time_do_not_meet(tmp_path):
    path = tmp_path / "entry.json"
    with atomic_file(path) as first:
        first.write_text("first")
        with atomic_file(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["entry.json"]
