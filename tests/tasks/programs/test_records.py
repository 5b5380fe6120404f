"""Reading the public formats; every irregularity is told by file and line."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cycleqd_jax.tasks.programs.records import Inputs, Name, Statements, read_records
from cycleqd_jax.tasks.programs.restore import restore
from cycleqd_jax.tasks.programs.runner import decode

from .conftest import MBPP, write_files


def test_mbpp_is_read(files: Path) -> None:
    (record,) = read_records("mbpp", files)
    assert (record.id, record.family, record.function) == ("mbpp/601", "mbpp", "double")
    assert record.split == "train"
    assert record.reference == "def double(x):\n  return 2 * x"
    assert record.tests == Statements(
        "\n".join(MBPP["test_list"]), "", ("double(2)", "double(0)", "double(-3)")
    )
    (record,) = read_records("mbpp/sanitized", files)
    assert (record.id, record.split) == ("mbpp/2", "prompt")
    assert isinstance(record.tests, Statements)
    assert (record.tests.setup, record.tests.calls) == ("import math", ("root(2)", "root(4)"))


def test_calls_are_listed_in_the_order_of_their_evaluation(tmp_path: Path) -> None:
    tests = ["assert double(double(1)) == double(2) + f(double(0))"]
    folder = write_files(tmp_path, MBPP={"test_list": tests})
    (record,) = read_records("mbpp", folder)
    assert isinstance(record.tests, Statements)
    assert record.tests.calls == ("double(1)", "double(double(1))", "double(2)", "double(0)")


def test_plus_files_are_read_with_their_arguments_restored(files: Path) -> None:
    (record,) = read_records("mbpp+", files)
    assert (record.id, record.function, record.split) == ("mbpp/63", "pair", None)
    assert isinstance(record.tests, Inputs)
    assert [decode(call) for call in record.tests.base] == [([(1, 2)],), ([(3, 4), (5, 6)],)]
    (plain,), (plus,) = read_records("humaneval", files), read_records("humaneval+", files)
    assert plain.id == plus.id == "humaneval/7"
    assert plain.reference == plus.reference
    assert isinstance(plus.tests, Inputs)
    assert [decode(call) for call in plus.tests.plus] == [([1e300, 1e300],), ([0.7, 0.1],)]


def test_an_object_may_stand_for_no_arguments(tmp_path: Path) -> None:
    (record,) = read_records("mbpp+", write_files(tmp_path, MBPP_PLUS={"plus_input": {}}))
    assert isinstance(record.tests, Inputs)
    assert record.tests.plus == ()


@pytest.mark.parametrize(
    ("number", "arguments", "restored"),
    [
        (1, [[1, 2]], ([1, 2],)),
        (2, [[1], [2]], ((1,), (2,))),
        (75, [[[1], [2]], 3], ([(1,), (2,)], 3)),
        (106, [[1], [2]], ([1], (2,))),
        (115, [[[1, 1], [], {"a": 1}]], ([{1}, {}, {}],)),
        (124, ["1", "(-0-2j)"], (1.0, -2j)),
        (252, ["(1+2j)"], (1 + 2j,)),
        (259, [[[1, 2]], [[3]]], (((1, 2),), ((3,),))),
        (278, [[1, [2], "x"]], ((1, (2,), "x"),)),
        (307, [[1, [2]], 3, 4], ((1, [2]), 3, 4)),
        (580, [[1, [2, [3]]]], ((1, (2, (3,))),)),
        (722, [{"a": [1, 2]}, 5], ({"a": (1, 2)}, 5)),
    ],
)
def test_what_json_took_is_put_back(number: int, arguments: list[Any], restored: Any) -> None:
    found = restore(number, arguments)
    assert repr(found) == repr(restored)


IRREGULAR: list[tuple[Name, dict[str, Any], str]] = [
    ("mbpp", {"task_id": 975}, "task_id: expected 1 to 974, found 975"),
    ("mbpp", {"task_id": True}, "task_id: expected int, found True"),
    ("mbpp", {"code": "def f(:"}, "invalid syntax"),
    ("mbpp", {"code": "def other(x): pass"}, "calls of one function of the code .*found none"),
    ("mbpp", {"test_list": []}, "test_list: expected tests, found none"),
    ("mbpp", {"test_list": [1]}, r"test_list: expected texts, found \[1\]"),
    ("mbpp", {"text": None}, "text: expected str, found nothing"),
    ("mbpp/sanitized", {"test_imports": "math"}, "test_imports: expected list, found 'math'"),
    ("mbpp+", {"task_id": "HumanEval/3"}, "task_id: expected Mbpp/NUMBER, found 'HumanEval/3'"),
    ("mbpp+", {"base_input": []}, "base_input: expected a list of argument lists, found none"),
    ("mbpp+", {"plus_input": [3]}, "plus_input: expected a list of argument lists"),
    ("mbpp+", {"plus_input": [[[5]]]}, "plus_input: expected this problem's arguments, found"),
    ("mbpp+", {"atol": "0"}, "atol: expected .*, found '0'"),
    ("humaneval", {"entry_point": 3}, "entry_point: expected str, found 3"),
    ("humaneval+", {"task_id": "HumanEval/x"}, "task_id: expected HumanEval/NUMBER"),
]
_CONSTANT = {
    "mbpp": "MBPP",
    "mbpp/sanitized": "SANITIZED",
    "mbpp+": "MBPP_PLUS",
    "humaneval": "HUMANEVAL",
    "humaneval+": "HUMANEVAL_PLUS",
}


@pytest.mark.parametrize(("name", "changes", "message"), IRREGULAR)
def test_an_irregular_record_is_told_by_file_and_line(
    name: Name, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_files(tmp_path, **{_CONSTANT[name]: changes})
    place = "mbpp.json, record 1" if name == "mbpp/sanitized" else r"jsonl(\.gz)?:1"
    told = rf"1 irregular {name.replace('+', '.')} [^\n]*\n.*{place}: .*{message}"
    with pytest.raises(ValueError, match=told):
        read_records(name, folder)


def test_all_irregular_records_are_told_at_once_or_left_out(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    path = folder / "mbpp" / "mbpp.jsonl"
    path.write_text("\n".join(["{", json.dumps(MBPP), "[1]", json.dumps(MBPP)]))
    with pytest.raises(ValueError, match="3 irregular mbpp records") as error:
        read_records("mbpp", folder)
    told = str(error.value).splitlines()[1:]
    assert [line.split(":")[1] for line in told] == ["1", "3", "4"]
    assert "found mbpp/601 again" in told[2]
    assert [record.id for record in read_records("mbpp", folder, irregular="skip")] == ["mbpp/601"]


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mbpp\.jsonl: no such file; put the benchmark's file"):
        read_records("mbpp", tmp_path)
    folder = write_files(tmp_path)
    (folder / "mbpp" / "MbppPlus-v0.2.0.jsonl").touch()
    with pytest.raises(ValueError, match=r"expected one version, found MbppPlus-v0\.1\.0\.jsonl"):
        read_records("mbpp+", folder)
    for name, path in (("humaneval", "humaneval/HumanEval.jsonl.gz"), ("mbpp", "mbpp/mbpp.jsonl")):
        (folder / path).write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match=r"expected UTF-8 \(in gzip, if \.gz\), found"):
            read_records(name, folder)  # type: ignore[arg-type]
    (folder / "mbpp" / "mbpp.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="expected mbpp records, found none"):
        read_records("mbpp", folder)
    (folder / "mbpp" / "sanitized-mbpp.json").write_text("{}")
    with pytest.raises(ValueError, match="expected one JSON list, found dict"):
        read_records("mbpp/sanitized", folder)


def test_the_public_files(public_files: Path) -> None:
    sizes = {"mbpp": 974, "mbpp/sanitized": 427, "humaneval": 164}
    names: list[Name] = ["mbpp", "mbpp/sanitized", "humaneval"]
    records = {name: read_records(name, public_files) for name in names}
    assert {name: len(found) for name, found in records.items()} == sizes
    splits = {name: Counter(r.split for r in found) for name, found in records.items()}
    assert splits["mbpp"] == {"prompt": 10, "test": 500, "validation": 90, "train": 374}
    assert splits["mbpp/sanitized"] == {"prompt": 7, "test": 257, "validation": 43, "train": 120}
    assert splits["humaneval"] == {None: 164}
