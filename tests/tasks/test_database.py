"""The database agent's judge: what is shown, what scores, and what must not."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cycleqd_jax.sandbox import Sandbox
from cycleqd_jax.tasks.base import Request
from cycleqd_jax.tasks.database import DatabaseProblem, DatabaseTask, show_rows, show_value
from cycleqd_jax.tasks.rollout import rollout

TASK = DatabaseTask()
SETUP = """CREATE TABLE staff (name TEXT, city TEXT, age INTEGER, salary INTEGER);
INSERT INTO staff VALUES ('Ann', 'Rome', 31, 50), ('Bob', 'Oslo', 42, 60),
('Eva', 'Rome', 23, 70);"""
QUESTION = DatabaseProblem(
    prompt="Table staff. How old is Bob?",
    answers=("SQL: SELECT age FROM staff WHERE name = 'Bob'", "Answer: 42"),
    solution="",
    observations=("42",),
    document="",
    kind="lookup",
    setup=SETUP,
    dump="SELECT * FROM main.staff ORDER BY 1, 2, 3, 4",
    state=[["Ann", "Rome", 31, 50], ["Bob", "Oslo", 42, 60], ["Eva", "Rome", 23, 70]],
    changes=False,
)
# Everybody in Rome gets 5 more.
CHANGE = dataclasses.replace(
    QUESTION,
    prompt="Table staff. Raise the salary by 5 for staff with city Rome.",
    answers=("SQL: UPDATE staff SET salary = salary + 5 WHERE city = 'Rome'", "Answer: done"),
    observations=("ok",),
    state=[["Ann", "Rome", 31, 55], ["Bob", "Oslo", 42, 60], ["Eva", "Rome", 23, 75]],
    changes=True,
)
RAISE = "UPDATE staff SET salary = salary + 5"

RIGHT_CHANGES = {
    "the demonstration": CHANGE.answers,
    "in a fence": (f"```sql\nSQL: {RAISE} WHERE city = 'Rome'\n```", "Answer: done"),
    "semicolon and other words": (f"SQL:\n{RAISE}\nWHERE name <> 'Bob';", "Answer: it is."),
    "returning rows": (f"SQL: {RAISE} WHERE city = 'Rome' RETURNING name", "Answer: done"),
}
WRONG_CHANGES = {
    "wrong rows": f"{RAISE} WHERE city = 'Oslo'",
    "all rows": RAISE,
    "no rows": f"{RAISE} WHERE city = 'rome'",
    "wrong amount": "UPDATE staff SET salary = salary + 6 WHERE city = 'Rome'",
    "wrong column": "UPDATE staff SET age = age + 5 WHERE city = 'Rome'",
    "text instead of numbers": "UPDATE staff SET salary = (salary + 5) || 'x' WHERE city = 'Rome'",
    "only looks": "SELECT salary + 5 FROM staff WHERE city = 'Rome'",
    "adds rows": "INSERT INTO staff VALUES ('Ann', 'Rome', 31, 55), ('Eva', 'Rome', 23, 75)",
    "drops the table": "DROP TABLE staff",
    "renames the table": "ALTER TABLE staff RENAME TO people",
    "adds a column": "ALTER TABLE staff ADD COLUMN bonus INTEGER DEFAULT 5",
    "empties the table": "DELETE FROM staff",
    "does it elsewhere": "CREATE TABLE other AS SELECT name, city, age, salary + 5 FROM staff",
    "hides the table": "CREATE TEMP VIEW staff AS SELECT name, city, age, "
    "salary + 5 * (city = 'Rome') AS salary FROM main.staff",
    "hides the table with a table": "CREATE TEMP TABLE staff AS SELECT name, city, age, "
    "salary + 5 * (city = 'Rome') AS salary FROM main.staff",
    "bytes nobody can show": "UPDATE staff SET name = CAST(x'ff' AS TEXT)",
    "blob in the table": "UPDATE staff SET name = x'00'",
    "two statements": f"{RAISE} WHERE name = 'Ann'; {RAISE} WHERE name = 'Eva'",
    "right, then another": f"{RAISE} WHERE city = 'Rome'; SELECT 1",
    "another, then right": f"SELECT 1; {RAISE} WHERE city = 'Rome'",
    "attaches a file": "ATTACH DATABASE 'copy.db' AS copy",
    "writes a file": "VACUUM INTO 'copy.db'",
    "turns off the rules": "PRAGMA writable_schema = ON",
    "syntax error": "UPDATE staff WHERE city = 'Rome' SET salary = salary + 5",
    "NUL": f"{RAISE}\0 WHERE city = 'Rome'",
    "comment only": "-- " + RAISE,
}
DENIED = ("ATTACH DATABASE ':memory:' AS more", "PRAGMA user_version = 3", "DETACH DATABASE main")


def observations(sandbox: Sandbox, statements: Sequence[str]) -> list[str]:
    """What the agent is shown after each statement; nothing for none."""
    shown = [""] * len(statements)

    def policy(requests: Sequence[Request]) -> list[str]:
        for request in requests:
            if len(request.messages) == 3:
                assert request.messages[0] == ("user", QUESTION.prompt)
                assert request.messages[1] == ("assistant", f"SQL: {statements[request.candidate]}")
                assert request.messages[2].role == "user"
                shown[request.candidate] = request.messages[2].content
        return [f"SQL: {statements[r.candidate]}" if len(r.messages) == 1 else "" for r in requests]

    rollout([TASK], {"database": [QUESTION]}, len(statements), policy, sandbox)
    return shown


@pytest.mark.parametrize("name", RIGHT_CHANGES)
def test_right_changes_score_one(name, score):
    assert score(TASK, CHANGE, [RIGHT_CHANGES[name]]) == [1.0]


@pytest.mark.parametrize("name", WRONG_CHANGES)
def test_wrong_changes_score_zero(name, score):
    assert score(TASK, CHANGE, [(f"SQL: {WRONG_CHANGES[name]}", "Answer: done")]) == [0.0]


@pytest.mark.parametrize(
    "answer", ["", "done", " Answer: done", "SQL: SELECT 1", "The Answer: done"]
)
def test_a_change_has_to_be_reported(answer: str, score: Any) -> None:
    assert score(TASK, CHANGE, [(CHANGE.answers[0], answer)]) == [0.0]


@pytest.mark.parametrize(
    "answer", ["", "42", "Answer: 43", "Answer: 42.0", "answer: 42", "Answer: 42 years"]
)
def test_the_right_statement_does_not_make_a_wrong_answer_right(answer: str, score: Any) -> None:
    assert score(TASK, QUESTION, [(QUESTION.answers[0], answer)]) == [0.0]


@pytest.mark.parametrize(
    "first",
    [
        "",
        "Answer: 42",
        "Answer:",
        "SQL:",
        "SQL:  \n",
        "SELECT age FROM staff",
        "Sure! SQL: SELECT 1",
    ],
)
@pytest.mark.parametrize("problem", [QUESTION, CHANGE], ids=["question", "change"])
def test_without_a_statement_first_nothing_scores(
    first: str, problem: DatabaseProblem, score: Any
) -> None:
    assert score(TASK, problem, [(first, problem.answers[-1])]) == [0.0]


GUESSES = {
    "after an error": "SELECT shoe FROM staff",
    "after what is denied": "PRAGMA user_version = 3",
    "after looking elsewhere": "SELECT age FROM staff WHERE name = 'Ann'",
    "after seeing nothing": "SELECT age FROM staff WHERE name = 'Nobody'",
    "after changing the table": "DELETE FROM staff WHERE name = 'Ann' RETURNING 42",
    "after dropping the table": "DROP TABLE staff",
}


@pytest.mark.parametrize("name", GUESSES)
def test_a_right_guess_scores_zero(name, score):
    assert score(TASK, QUESTION, [(f"SQL: {GUESSES[name]}", "Answer: 42")]) == [0.0]


def test_more_columns_than_needed_still_show_the_answer(score):
    assert score(TASK, QUESTION, [("SQL: SELECT * FROM staff", "Answer: 42")]) == [1.0]


def test_a_view_in_the_place_of_a_generated_table_scores_zero(score):
    problems = TASK.problems("train", 30, difficulty=1)
    problem = next(problem for problem in problems if problem.kind == "insert")
    table, values = problem.answers[0].removeprefix("SQL: INSERT INTO ").split(" ", 1)
    view = f"CREATE TEMP VIEW {table} AS SELECT * FROM main.{table} UNION ALL {values}"
    attempts = [(f"SQL: {view}", "Answer: done"), problem.answers]
    assert score(TASK, problem, attempts) == [0.0, 1.0]


def test_space_around_the_right_answer_does_not_matter(score):
    assert score(TASK, QUESTION, [(QUESTION.answers[0], " Answer: 42\n")]) == [1.0]


@pytest.mark.parametrize(
    "statement",
    [
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT MAX(x) FROM c",
        "SELECT LENGTH(randomblob(900000000) || randomblob(900000000))",
    ],
)
def test_endless_and_greedy_statements_score_zero(
    statement: str, score: Any, hasty: Sandbox
) -> None:
    assert score(TASK, QUESTION, [(f"SQL: {statement}", "Answer: 42")], hasty) == [0.0]


def test_the_agent_sees_rows_values_and_errors(sandbox: Sandbox) -> None:
    seen = {
        "SELECT age FROM staff WHERE name = 'Bob'": "42",
        "SELECT name, age FROM staff ORDER BY age": "Eva, 23; Ann, 31; Bob, 42",
        "SELECT AVG(age), AVG(salary) FROM staff": "32, 60",
        "SELECT AVG(age) FROM staff WHERE city = 'Rome' OR age < 1": "27",
        "SELECT AVG(salary) FROM staff WHERE salary > 55 OR age = 31": "60",
        "SELECT 1.26, NULL, 'a''b', 9e999": "1.3, none, a'b, inf",
        "SELECT name FROM staff WHERE age > 99": "no rows",
        f"{RAISE} WHERE age > 99": "ok",
        "SELECT shoe FROM staff": "error: no such column: shoe",
        "SELECT 1; SELECT 2": "error: You can only execute one statement at a time.",
        "SELECT " + "x" * 90: "error: no such column: " + "x" * 44,
    }
    shown = dict(zip(seen, observations(sandbox, list(seen)), strict=True))
    shown = {k: v[: len(seen[k])] if v.startswith("error") else v for k, v in shown.items()}
    assert shown == seen


def test_only_the_one_database_can_be_touched(sandbox: Sandbox) -> None:
    shown = observations(sandbox, DENIED)
    assert shown == ["error: not authorized"] * len(DENIED)


def test_long_results_and_errors_are_cut(sandbox: Sandbox) -> None:
    count = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
    rows, text, error = observations(
        sandbox,
        [f"{count} SELECT x FROM c", "SELECT hex(zeroblob(300))", "SELECT " + "x" * 90],
    )
    assert rows == "; ".join(str(number) for number in range(1, 21))
    assert text == "0" * 200
    assert error == "error: no such column: " + "x" * 44
    assert len(error) == len("error: ") + 60


def test_every_problem_starts_from_a_fresh_table(score):
    attempts = [("SQL: DELETE FROM staff", "Answer: done"), CHANGE.answers] * 4
    assert score(TASK, CHANGE, attempts) == [0.0, 1.0] * 4


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-99, 99), min_size=1, max_size=4), min_size=1, max_size=8))
def test_rows_of_numbers_can_be_read_back(rows: list[list[int]]) -> None:
    shown = show_rows(rows)
    assert [[int(value) for value in row.split(", ")] for row in shown.split("; ")] == rows


VALUES = st.none() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.floats(allow_nan=False)


@settings(deadline=None)
@given(st.none() | st.lists(st.lists(VALUES, max_size=5), max_size=20))
def test_any_result_is_shown_in_at_most_two_hundred_characters(rows: Any) -> None:
    shown = show_rows(rows)
    assert len(shown) <= 200
    assert (shown == "ok") == (rows is None) or rows == [["ok"]]
    assert (shown == "no rows") == (rows == []) or rows == [["no rows"]]


@settings(deadline=None)
@given(st.floats(-1e6, 1e6))
def test_numbers_are_shown_to_one_digit(value: float) -> None:
    shown = show_value(value)
    assert abs(float(shown) - value) <= 0.05 + 1e-9
    assert ("." in shown) == (not value.is_integer())


@pytest.mark.parametrize(
    ("value", "shown"), [(np.inf, "inf"), (3.0, "3"), (2.25, "2.2"), (7, "7"), (None, "none")]
)
def test_single_values(value: Any, shown: str) -> None:
    assert show_value(value) == shown
