"""Append-only logs: a row is one line of JSON, written by one system call.

A process killed at any moment leaves at most one torn last line, which reading skips and the next
`JsonlWriter` cuts off. Non-finite floats read back as floats (see `records.files`).
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cycleqd_jax.atomic import atomic_file, explain_no_space
from cycleqd_jax.runs.records.files import from_json, to_json

Row = dict[str, Any]


class JsonlWriter:
    """Appends rows to a log; creates it if it is missing and repairs a torn last line.

    Args:
        path: the log.
        plain: rows are written as JSON has them: strings may be any text, numbers must be finite.
    """

    def __init__(self, path: Path, *, plain: bool = False):
        self.path = path
        self._plain = plain
        with explain_no_space(path):
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  (`close` closes it)
        size = self._file.seek(0, os.SEEK_END)
        whole = _whole_size(self._file.fileno(), size)
        if whole < size:
            os.ftruncate(self._file.fileno(), whole)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row; it is in the file when the call returns.

        Raises:
            ValueError: if JSON cannot hold the row.
            NoSpaceError: if the disk is full; the log then ends with its last whole row.
        """
        # Any text: half of a surrogate pair too, which has no encoding of its own.
        value = row if self._plain else to_json(row, "row")
        line = json.dumps(value, allow_nan=False, ensure_ascii=self._plain) + "\n"
        data = memoryview(line.encode())
        descriptor = self._file.fileno()
        start = os.fstat(descriptor).st_size
        try:
            with explain_no_space(self.path):
                while data:
                    data = data[os.write(descriptor, data) :]
        except BaseException:
            os.ftruncate(descriptor, start)
            raise

    def sync(self) -> None:
        """Waits until the rows are on the disk, so that they survive a power cut too."""
        with explain_no_space(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the log; more than once is fine."""
        self._file.close()

    def __enter__(self) -> "JsonlWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class NoLog:
    """Takes the place of a `JsonlWriter` where nothing is written."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Write nothing."""

    def sync(self) -> None:
        """Wait for nothing."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


Log = JsonlWriter | NoLog


def read_jsonl(path: Path, *, plain: bool = False) -> list[Row]:
    """All whole rows of a log; a missing file has none.

    Args:
        path: the log.
        plain: it was written so, see `JsonlWriter`.

    Raises:
        ValueError: if a line before the last is not a JSON object; the message names file and line.
    """
    return [row for _, row in _rows(path, plain)]


def keep_rows(path: Path, keep: Callable[[Row], bool]) -> int:
    """Rewrites the log, atomically, with only the rows `keep` accepts; returns how many went.

    Call it before a `JsonlWriter` is opened on the file.
    """
    kept, dropped = [], 0
    for line, row in _rows(path):
        if keep(row):
            kept.append(line)
        else:
            dropped += 1
    if dropped:
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))
    return dropped


def truncate_after(path: Path, generation: int) -> int:
    """Drops the rows newer than the generation a run resumes from; returns how many went.

    Raises:
        ValueError: if a row has no integer ``generation``.
    """

    def is_old(row: Row) -> bool:
        if not isinstance(row.get("generation"), int):
            raise ValueError(f"{path}: expected an integer 'generation' in every row, found {row}")
        return bool(row["generation"] <= generation)

    return keep_rows(path, is_old)


def _rows(path: Path, plain: bool = False) -> Iterator[tuple[bytes, Row]]:
    if not path.exists():
        return
    *lines, _torn = path.read_bytes().split(b"\n")  # after the last newline: nothing, or a torn row
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if plain else from_json(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path} line {number}: expected JSON, found {line[:80]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number}: expected a JSON object, found {line[:80]!r}")
        yield line, row


def _whole_size(descriptor: int, size: int, block: int = 1 << 16) -> int:
    """Length up to and including the last newline, found from the end."""
    end = size
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
