"""Reading the public files' format; every irregularity is told by file and line."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cycleqd_jax.tasks.dbbench.records import KINDS, in_paper, read_records


def raw(**changes: Any) -> dict[str, Any]:
    info = {
        "columns": [{"name": "a", "type": "INT"}, {"name": "b c", "type": "TEXT"}],
        "rows": [["1", "x"], ["2", ""]],
    }
    record = {
        "description": "Who?",
        "add_description": "The name of this table is t.",
        "label": ["x"],
        "type": ["other"],
        "table": {"table_name": "t", "table_info": {**info, **changes.pop("info", {})}},
        "source": "wikisql",
    }
    return {**record, **changes}


def write(folder: Path, *records: Any, name: str = "standard.jsonl") -> Path:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "dev.jsonl").touch()
    return folder


def test_a_record_is_read(tmp_path: Path) -> None:
    change = raw(type=["INSERT"], label=["INSERT INTO t VALUES (1, 2)"], answer_md5="[('f',)]")
    asked, changed = read_records(write(tmp_path, raw(), "", change))
    assert (asked.id, asked.index, asked.kind) == ("standard/0", 0, "other")
    assert asked.question == "Who?\nThe name of this table is t."
    assert asked.table.name == "t"
    assert asked.table.columns == ("a", "b c")
    assert asked.table.rows == (("1", "x"), ("2", ""))
    assert (asked.labels, asked.answer_md5, asked.changes) == (("x",), None, False)
    # An empty line is no record; the id is the line's.
    assert (changed.id, changed.index, changed.changes) == ("standard/2", 1, True)
    assert changed.answer_md5 == "[('f',)]"


def test_numbers_become_text_and_line_separators_stay(tmp_path: Path) -> None:
    rows = [[1, 330.6], [None, "a\u2028b\u0085"]]
    text = json.dumps(raw(info={"rows": rows}), ensure_ascii=False)
    (record,) = read_records(write(tmp_path, text))
    assert record.table.rows == (("1", "330.6"), (None, "a\u2028b\u0085"))


IRREGULAR = [
    ("{", "Expecting property name"),
    ("[" * 100_000, "Recursion|recursion"),
    ("[1]", "type: expected list, found nothing"),
    (raw(type=["DANCE"]), "type: expected one of other, .*, found 'DANCE'"),
    (raw(type=["other", "other"]), "type: expected one entry, found 2"),
    (raw(label=[]), r"label: expected strings, found \[\]"),
    (raw(label=[3]), r"label: expected strings, found \[3\]"),
    (raw(description=None), "description: expected str, found nothing"),
    (raw(type=["UPDATE"]), "answer_md5: expected str, found nothing"),
    (raw(type=["UPDATE"], label=["a", "b"], answer_md5=""), "label: expected one entry, found 2"),
    (raw(table={"table_name": ""}), "table_info: expected dict, found nothing"),
    (raw(info={"columns": [{"name": ""}, {"name": "b"}]}), "column 1: expected a name .* ''"),
    (raw(info={"columns": [{"name": "a"}, {"name": "A"}]}), "columns: .*, found 'a' more than"),
    (raw(info={"columns": []}), "columns: expected different names"),
    (raw(info={"columns": [{"name": "a"}, {"name": "b" * 65}]}), "column 2: expected a name"),
    (raw(info={"rows": [["1", "x"], ["2"]]}), "row 2: expected 2 cells, found 1"),
    (raw(info={"rows": [["1", ["x"]]]}), r"expected cells that are text or numbers, .*\['x'\]"),
    (raw(info={"rows": [["1", True]]}), "expected cells that are text or numbers, found True"),
]


@pytest.mark.parametrize(("line", "message"), IRREGULAR)
def test_an_irregular_record_is_told_by_file_and_line(
    line: Any, message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, raw(), line)
    with pytest.raises(ValueError, match=f"standard.jsonl:2: .*{message}"):
        read_records(folder)
    assert [record.index for record in read_records(folder, irregular="skip")] == [0]


def test_all_irregular_records_are_told_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path, "{", raw(), "{", raw())
    with pytest.raises(ValueError, match=r"2 irregular DBBench records.*left out") as error:
        read_records(folder)
    assert "standard.jsonl:1:" in str(error.value)
    assert "standard.jsonl:3:" in str(error.value)
    assert [record.index for record in read_records(folder, irregular="skip")] == [1, 3]


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"standard.jsonl: no such file; expected a folder with"):
        read_records(tmp_path)
    (tmp_path / "standard.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"standard.jsonl: expected UTF-8, found"):
        read_records(tmp_path)
    write(tmp_path, "")
    with pytest.raises(ValueError, match=r"expected DBBench records in standard.jsonl, dev.jsonl"):
        read_records(tmp_path)


def test_the_public_files(public_files: Path) -> None:
    with pytest.raises(ValueError, match="5 irregular DBBench records") as error:
        read_records(public_files)
    for place in ("standard.jsonl:14", "standard.jsonl:15", "standard.jsonl:18",
                  "standard.jsonl:78", "dev.jsonl:6"):  # fmt: skip
        assert f"{place}:" in str(error.value)
    records = read_records(public_files, irregular="skip")
    assert len(records) == 355
    assert records[-1].index == 359
    counts = Counter(record.kind for record in records)
    assert counts["INSERT"] == counts["UPDATE"] == 120
    assert set(counts) == set(KINDS) - {"DELETE"}
    # Four more of the paper's 341 are irregular, and one of dev's.
    assert sum(map(in_paper, records)) == 336
