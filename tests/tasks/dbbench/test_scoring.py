"""Judging answers and tables as AgentBench v0.2 does."""

import hashlib
import warnings

import pytest

from cycleqd_jax.tasks.dbbench.records import Record, Table
from cycleqd_jax.tasks.dbbench.scoring import accuracies, read_answer, same_answer, table_hash


@pytest.mark.parametrize(
    ("text", "labels", "right"),
    [
        (' ["Paris"]', ["Paris"], True),
        (' ["paris"]', ["Paris"], False),
        (' ["Paris", "Rome"]', ["Rome", "Paris"], True),
        (' ["Paris", "Paris", "Rome"]', ["Rome", "Paris"], True),
        (' ["Paris"]', ["Rome", "Paris"], False),
        (' ("Paris",)', ["Paris"], True),
        # One answer and one label are numbers where both are.
        (" [3]", ["3"], True),
        (' ["3.0"]', ["3"], True),
        (" 3", ["3.00"], True),
        (' ["1,200"]', ["1200"], False),
        (' ["1,200"]', ["1,200"], True),
        # Several are a set of what they are: a number is no string.
        (" [3, 4]", ["3", "4"], False),
        (' ["3", "4"]', ["4", "3"], True),
        (' [["3"], "4"]', ["4", "3"], False),
        # What is no literal is one string, with its space; a string is its characters.
        (" Paris", ["Paris"], False),
        (" Paris", [" Paris"], True),
        (' "ab"', ["a", "b"], True),
        (" [1 + 2]", ["3"], False),
        ("", ["x"], False),
        (" []", ["x"], False),
        (" [None]", ["x"], False),
        (' {"a": 1}', ["a"], True),
    ],
)
def test_answers_are_judged_by_the_rules(text: str, labels: list[str], right: bool) -> None:
    assert same_answer(text, labels) is right


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "[].__class__",
        "(" * 9_000,
        "-" * 9_000 + "1",
        "[" * 90 + "]" * 90 + "+" * 9_000 + "1",
        "[" + "1," * 100_000 + "]",
        "9" * 9_000,
        "1e999999",
        "[1e999 - 1e999]",
        "\0",
        "'\udc80",
        "10 ** 10 ** 10",
        "lambda: 0",
    ],
)
def test_hostile_answers_are_wrong_and_nothing_else(text: str) -> None:
    assert not same_answer(text, ["1"])
    assert not same_answer(text, ["1", "2"])


def test_a_number_beyond_floats_is_wrong() -> None:
    assert not same_answer(f"[{'9' * 4000}]", ["1"])


def test_a_stray_backslash_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_answer(r'["\d"]') == ["\\d"]


def test_the_hash_is_that_of_mysql_query() -> None:
    rows = [b"a,x", b"b"]
    digits = sorted(hashlib.md5(row).hexdigest()[:5] for row in rows)
    expected = hashlib.md5(",".join(digits).encode()).hexdigest()
    table = Table("t", ("c", "d"), (("b", None), ("a", "x")))
    assert table_hash(table) == f"[('{expected}',)]"
    assert table_hash(Table("t", ("c", "d"), table.rows[::-1])) == table_hash(table)
    assert table_hash(Table("t", ("c",), ())) == "[(None,)]"


def test_the_overall_is_the_mean_of_three_groups() -> None:
    table = Table("t", ("c",), ())
    kinds = ["other", "counting", "counting", "INSERT", "UPDATE"]
    records = [Record(str(i), i, kind, "q", table, ("x",)) for i, kind in enumerate(kinds)]
    found = accuracies(records, [1.0, 1.0, 0.0, 1.0, 0.0])
    assert found["counting"] == 0.5
    assert found["SELECT"] == pytest.approx(2 / 3)
    assert found["overall"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["pooled"] == pytest.approx(3 / 5)
    assert accuracies(records[:1], [1.0])["overall"] == 1.0
