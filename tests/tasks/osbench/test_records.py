"""Reading the public files' format; every irregularity is told by file and place."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cycleqd_jax.tasks.osbench.offline import NEEDS_USERS, NOT_OFFLINE
from cycleqd_jax.tasks.osbench.records import CATEGORIES, Script, in_paper, read_records

INTEGER = {"language": "python", "file": "check/integer-match.py"}


def raw(**changes: Any) -> dict[str, Any]:
    return {"description": "How many?", "evaluation": {"match": "3"}, **changes}


def write(folder: Path, *problems: Any) -> Path:
    """A folder in which only the second category has these problems, the others one each."""
    for kind in CATEGORIES:
        (folder / "data" / kind).mkdir(parents=True)
        (folder / "data" / kind / "one.json").write_text(json.dumps(raw()))
    (folder / "data" / "2" / "one.json").write_text(json.dumps(list(problems)))
    (folder / "data" / "dev.json").write_text(json.dumps([raw(), raw()]))
    return folder


def test_scripts_come_in_three_forms(tmp_path: Path) -> None:
    problem = raw(
        create={"local": "default", "init": ["ls", {"code": "pwd"}, INTEGER]},
        start={"language": "bash", "code": "cd /"},
        evaluation={"check": [None, INTEGER], "example": "echo 3"},
        explanation="never shown",
    )
    record = read_records(write(tmp_path, raw(), problem))[2]
    assert (record.id, record.index, record.kind) == ("2/one/1", 2, "2")
    assert record.init[:2] == (Script("bash", "ls"), Script("bash", "pwd"))
    assert record.init[2].language == "python"
    assert "int(sys.argv[1])" in record.init[2].code
    assert record.start == Script("bash", "cd /")
    assert record.checks == (None, record.init[2])
    assert record.example == Script("bash", "echo 3")
    assert "never shown" not in repr(record)


def test_a_single_script_or_problem_needs_no_list(tmp_path: Path) -> None:
    folder = write(tmp_path, raw(create={"init": "ls"}, evaluation={"check": "true"}))
    records = read_records(folder)
    assert [r.id for r in records[:3]] == ["1/one/0", "2/one/0", "3/one/0"]
    assert [r.id for r in records[-2:]] == ["dev/0", "dev/1"]
    assert records[1].init == (Script("bash", "ls"),)
    assert records[1].checks == (Script("bash", "true"),)


def test_a_stray_list_sets_nothing_up(tmp_path: Path) -> None:
    assert read_records(write(tmp_path, raw(create=[None, INTEGER])))[1].init == ()


def test_arguments_come_as_the_original_passes_them() -> None:
    assert Script("bash", "x").command() == ["bash", "-c", "x"]
    assert Script("bash", "x").command("a", "b") == ["bash", "-c", "x", "--", "a", "b"]
    assert Script("python", "x").command("a") == ["python3", "-c", "x", "a"]


IRREGULAR = [
    ([1], "description: expected str, found nothing"),
    (raw(description=3), "description: expected str, found 3"),
    (raw(evaluation=None), "evaluation: expected dict, found nothing"),
    (raw(evaluation={}), "evaluation: expected match or check, found neither"),
    (raw(evaluation={"match": {"regex": "x"}}), "match: expected str, found {'regex'"),
    (raw(evaluation={"check": [None]}), "check: null stands for the example, and there is no"),
    (raw(evaluation={"check": []}), "evaluation: expected match or check, found neither"),
    (raw(create="default"), "create: expected an object, found 'default'"),
    (raw(create={"init": 3}), "init: expected a script, found 3"),
    (raw(start={"language": "c", "code": ""}), "start: expected one of bash, python, found 'c'"),
    (raw(start={"language": "bash"}), "code: expected str, found nothing"),
    (raw(start={"file": "../secret"}), "start: expected one of the scripts check/0.sh, .*secret"),
]


@pytest.mark.parametrize(("problem", "message"), IRREGULAR)
def test_an_irregular_problem_is_told_by_file_and_place(
    problem: Any, message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, raw(), problem, raw())
    with pytest.raises(ValueError, match=f"2/one.json: problem 1: {message}"):
        read_records(folder)
    kept = read_records(folder, irregular="skip")
    assert [record.index for record in kept] == [0, 1, *range(3, 11)]


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data/1: no problems; expected a folder with AgentBench"):
        read_records(tmp_path)
    folder = write(tmp_path, raw())
    (folder / "data" / "2" / "one.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"2/one.json: expected JSON in UTF-8, found"):
        read_records(folder)
    (folder / "data" / "2" / "one.json").write_text("[]")
    (folder / "data" / "dev.json").unlink()
    with pytest.raises(ValueError, match=r"dev.json: no such file"):
        read_records(folder)


def test_the_public_files(public_files: Path) -> None:
    records = read_records(public_files)
    counts = Counter(record.kind for record in records)
    assert [counts[kind] for kind in (*CATEGORIES, "dev")] == [7, 5, 6, 19, 10, 9, 88, 26]
    assert [record.index for record in records] == list(range(170))
    ids = {record.id for record in records}
    assert len(ids) == 170
    assert set(NOT_OFFLINE) <= ids
    assert set(NEEDS_USERS) <= ids
    assert sum(map(in_paper, records)) == 110
    assert sum(record.match is not None for record in records) == 14
    # All of dev; of the stock logs all but the first and the last.
    assert [r.index for r in records if not in_paper(r)][:4] == [0, 6, 9, 10]
    assert all(in_paper(record) for record in records if record.kind == "dev")
