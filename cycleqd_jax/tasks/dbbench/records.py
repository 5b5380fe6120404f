"""DBBench's public files (AgentBench v0.2), read and checked line by line."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cycleqd_jax.tasks.benchmark import Irregular, field_of, make_records

FILES = ("standard.jsonl", "dev.jsonl")
CHANGES = ("INSERT", "DELETE", "UPDATE")
KINDS = (
    "other",
    "counting",
    "comparison",
    "ranking",
    "aggregation-SUM",
    "aggregation-MIN",
    "aggregation-MAX",
    "aggregation-AVG",
    *CHANGES,
)
_MAX_NAME = 64  # characters of an identifier in MySQL

# What CycleQD leaves out of the 360 records (its `tasks/agentbench_db.py`, the list of task ids).
_NOT_IN_PAPER = frozenset(
    [96, 115, 144, 159, 177, 204, 212, 232, 261, 270, 291, 295, 296, 307, 323, 338, 341, 348, 358]
)


@dataclass(frozen=True)
class Table:
    """A table of text cells; None is NULL.

    Attributes:
        name: of the table, and in the original of its database.
        columns: their names, all of type TEXT whatever the file declares.
        rows: one cell a column.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | None, ...], ...]


@dataclass(frozen=True)
class Record:
    """One problem.

    Attributes:
        id: file and line, ``standard/96``; stable, as the public files do not change.
        index: its place in the files read one after the other.
        kind: one of `KINDS`.
        question: what is asked, in two lines.
        table: the database before the agent.
        labels: the right answers, or the one gold statement of a change.
        answer_md5: the table's hash after a right change, as `scoring.table_hash` writes it.
    """

    id: str
    index: int
    kind: str
    question: str
    table: Table
    labels: tuple[str, ...]
    answer_md5: str | None = None

    @property
    def changes(self) -> bool:
        """Whether the table is to be changed rather than asked."""
        return self.kind in CHANGES


def read_records(
    folder: Path, *, irregular: Irregular = "error", files: Sequence[str] = FILES
) -> list[Record]:
    """Read the problems of a DBBench folder, in the order of its files.

    Args:
        folder: holds ``standard.jsonl`` and ``dev.jsonl``.
        irregular: a record that MySQL cannot load is an "error", or is left out ("skip"). The
            indices of the others stay what they are. Five of the public 360 are such.
        files: which files, in which order.

    Raises:
        ValueError: a file is missing or not UTF-8, or records are irregular: all of them are named,
            by file and line.
    """
    what = f"DBBench records in {', '.join(files)}"
    return make_records(_makers(folder, files), what, folder, irregular, "dbbench/loadable")


def _makers(folder: Path, files: Sequence[str]) -> Iterator[tuple[str, Callable[[], Record]]]:
    index = 0
    for name in files:
        for number, line in _lines(folder / name):
            record_id = f"{name.removesuffix('.jsonl')}/{number - 1}"
            yield f"{folder / name}:{number}", partial(_parse, line, record_id, index)
            index += 1


def _parse(line: str, record_id: str, index: int) -> Record:
    return _record(json.loads(line), record_id, index)


def in_paper(record: Record) -> bool:
    """Whether CycleQD evaluates on this record: 341 of the 360 of standard and dev together."""
    return record.index not in _NOT_IN_PAPER


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        # Not splitlines: a cell may hold a line separator that is none to JSON.
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; expected a folder with AgentBench v0.2's data/dbbench"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, found {error}") from None
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _record(raw: Any, record_id: str, index: int) -> Record:
    kind = _only(field_of(raw, "type", list), "type")
    if kind not in KINDS:
        raise ValueError(f"type: expected one of {', '.join(KINDS)}, found {kind!r}")
    labels = field_of(raw, "label", list)
    if not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"label: expected strings, found {labels!r}")
    changes = kind in CHANGES
    if changes:
        _only(labels, "label")
    question = field_of(raw, "description", str) + "\n" + field_of(raw, "add_description", str)
    return Record(
        id=record_id,
        index=index,
        kind=kind,
        question=question,
        table=_table(field_of(raw, "table", dict)),
        labels=tuple(labels),
        answer_md5=field_of(raw, "answer_md5", str) if changes else None,
    )


def _table(raw: dict[str, Any]) -> Table:
    info = field_of(raw, "table_info", dict)
    name = _name(field_of(raw, "table_name", str), "table_name")
    columns = tuple(
        _name(field_of(column, "name", str), f"column {number}")
        for number, column in enumerate(field_of(info, "columns", list), 1)
    )
    folded = [column.casefold() for column in columns]
    if not columns or len(set(folded)) != len(columns):
        twice = next((c for c, f in zip(columns, folded, strict=True) if folded.count(f) > 1), None)
        raise ValueError(f"columns: expected different names, found {twice!r} more than once")
    rows = field_of(info, "rows", list)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) != len(columns):
            found = len(row) if isinstance(row, list) else repr(row)
            raise ValueError(f"row {number}: expected {len(columns)} cells, found {found}")
    return Table(name, columns, tuple(tuple(_cell(cell) for cell in row) for row in rows))


def _name(name: str, what: str) -> str:
    if not name or len(name) > _MAX_NAME or name != name.rstrip(" ") or "\0" in name:
        raise ValueError(
            f"{what}: expected a name of 1 to {_MAX_NAME} characters without a space at its end, "
            f"found {name!r}"
        )
    name.encode()  # a lone surrogate is an error, here and below
    return name


def _cell(cell: Any) -> str | None:
    # Five public records hold numbers; MySQL stores their text.
    if isinstance(cell, str):
        cell.encode()
    if cell is None or isinstance(cell, str):
        return cell
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return str(cell)
    raise ValueError(f"expected cells that are text or numbers, found {cell!r}")


def _only(values: list[Any], name: str) -> Any:
    if len(values) != 1:
        raise ValueError(f"{name}: expected one entry, found {len(values)}")
    return values[0]
