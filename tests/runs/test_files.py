import errno
import math
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.runs import files
from cycleqd_jax.runs.files import (
    NoSpaceError,
    atomic_file,
    explain_no_space,
    from_json,
    read_json,
    to_json,
    write_json_atomic,
    write_text_atomic,
)


def test_arrays_scalars_paths_and_tuples_become_plain_json():
    value = {
        "a": np.arange(3, dtype=np.int32),
        "b": jnp.float32(0.1),
        "c": (np.bool_(True), None),
        "d": Path("x/y"),
        "e": jnp.ones((1, 2)),
    }
    assert to_json(value) == {
        "a": [0, 1, 2],
        "b": float(np.float32(0.1)),
        "c": [True, None],
        "d": "x/y",
        "e": [[1.0, 1.0]],
    }


def test_non_finite_floats_read_back_as_floats(tmp_path):
    path = tmp_path / "a.json"
    write_json_atomic(path, {"x": [math.inf, -math.inf, 1.5], "y": np.float32("nan")})
    assert '"-Infinity"' in path.read_text()
    back = read_json(path)
    assert back["x"] == [math.inf, -math.inf, 1.5]
    assert math.isnan(back["y"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": [0, object()]}}, r"value\.a\.b\[1\]: expected numbers.*found object"),
        ({"a": {3: 1}}, r"value\.a: expected string keys, found 3 \(int\)"),
        ({"name": "NaN"}, r"value\.name: the string 'NaN' is reserved"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_name(value, message):
    with pytest.raises(ValueError, match=message):
        to_json(value)


def test_from_json_inverts_to_json_on_nested_data():
    value = {"a": [1, 2.5, "text", None, {"b": [math.inf, True]}]}
    assert from_json(to_json(value)) == value


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
    write_json_atomic(path, {"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(NoSpaceError, match=r"summary\.json: [\d,]+ bytes are free") as caught:
        write_json_atomic(path, {"a": 2})
    assert caught.value.errno == errno.ENOSPC
    assert read_json(path) == {"a": 1}
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


def test_a_file_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        read_json(path)
