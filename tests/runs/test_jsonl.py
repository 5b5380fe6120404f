import errno
import math
import os

import pytest

from cycleqd_jax.atomic import NoSpaceError
from cycleqd_jax.runs.records import jsonl
from cycleqd_jax.runs.records.jsonl import JsonlWriter, keep_rows, read_jsonl, truncate_after


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlWriter(path) as writer:
        for generation in range(1, 5):
            writer.write({"generation": generation, "best": [0.1 * generation]})
    return path


def test_rows_are_readable_at_once_and_append_across_openings(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    with JsonlWriter(path) as writer:
        writer.write({"a": 1})
        assert read_jsonl(path) == [{"a": 1}]
    with JsonlWriter(path) as writer:
        writer.write({"a": math.inf, "text": "line\nbreak ü"})
        writer.sync()
    assert read_jsonl(path) == [{"a": 1}, {"a": math.inf, "text": "line\nbreak ü"}]
    assert path.read_bytes().count(b"\n") == 2


def test_nan_reads_back(tmp_path):
    with JsonlWriter(tmp_path / "a.jsonl") as writer:
        writer.write({"score": math.nan})
    assert math.isnan(read_jsonl(tmp_path / "a.jsonl")[0]["score"])


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_skipped_and_repaired(log, cut):
    log.write_bytes(log.read_bytes()[:-cut])
    assert [row["generation"] for row in read_jsonl(log)] == [1, 2, 3]
    with JsonlWriter(log) as writer:
        writer.write({"generation": 4})
    assert [row["generation"] for row in read_jsonl(log)] == [1, 2, 3, 4]


def test_a_torn_line_longer_than_a_block_is_repaired(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 200_000)
    JsonlWriter(path).close()
    assert path.read_bytes() == b'{"a": 1}\n'
    path.write_bytes(b"x" * 200_000)
    JsonlWriter(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("line", [b"{oops\n", b"[1]\n", b"\xff\xfe\n"])
def test_damage_before_the_last_line_is_named(log, line):
    first, rest = log.read_bytes().split(b"\n", 1)
    log.write_bytes(first + b"\n" + line + rest)
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2: expected"):
        read_jsonl(log)


def test_truncate_after_drops_newer_rows_and_a_torn_one(log):
    log.write_bytes(log.read_bytes() + b'{"generation": 5, "be')
    assert truncate_after(log, 2) == 2
    assert [row["generation"] for row in read_jsonl(log)] == [1, 2]
    assert truncate_after(log, 2) == 0
    assert truncate_after(log.with_name("absent.jsonl"), 2) == 0


def test_truncation_keeps_the_bytes_of_the_rows_it_keeps(log):
    wanted = b"".join(log.read_bytes().splitlines(keepends=True)[:3])
    truncate_after(log, 3)
    assert log.read_bytes() == wanted


def test_truncation_refuses_rows_without_a_generation(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="expected an integer 'generation'"):
        truncate_after(path, 1)
    assert path.read_text() == '{"a": 1}\n'


def test_keep_rows_takes_any_rule(log):
    assert keep_rows(log, lambda row: row["generation"] % 2 == 0) == 2
    assert [row["generation"] for row in read_jsonl(log)] == [2, 4]


def test_a_full_disk_leaves_whole_rows_only(log, monkeypatch):
    before = log.read_bytes()
    write = os.write

    def half(descriptor, data):
        if len(data) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    with JsonlWriter(log) as writer:
        with monkeypatch.context() as patched:
            patched.setattr(jsonl.os, "write", half)
            with pytest.raises(NoSpaceError, match=r"metrics\.jsonl"):
                writer.write({"generation": 5, "note": "x" * 100})
        assert log.read_bytes() == before
        writer.write({"generation": 5})
    assert read_jsonl(log)[-1] == {"generation": 5}


def test_a_row_json_cannot_hold_writes_nothing(log):
    before = log.read_bytes()
    with JsonlWriter(log) as writer, pytest.raises(ValueError, match=r"row\.f: expected"):
        writer.write({"f": print})
    assert log.read_bytes() == before
