"""The database skill: an agent of two turns over a SQLite database made for the problem.

The model writes one SQL statement, sees what running it gave, then answers. Questions are judged by
the answer, which must have been seen in the result, inserts and updates by the table they leave
behind. Nobody may answer from a statement that failed, or change a table to answer a question.
"""

import json
import random
import sqlite3
from dataclasses import dataclass
from typing import Any, Literal

from cycleqd_jax.sandbox.base import Job, Outcome
from cycleqd_jax.tasks.base import Ask, Episode, Message, Problem, Run, Split, draw_problems
from cycleqd_jax.tasks.coding import strip_fence


@dataclass(frozen=True)
class Schema:
    """A table family: names of the table and of its text and number columns, and their words."""

    table: str
    text: tuple[tuple[str, tuple[str, ...]], ...]
    numbers: tuple[str, ...]


_PEOPLE = tuple(
    [
        "Ann",
        "Bob",
        "Carl",
        "Dora",
        "Eva",
        "Finn",
        "Gina",
        "Hugo",
        "Iris",
        "Jack",
        "Kate",
        "Liam",
        "Mona",
        "Nils",
        "Olga",
        "Paul",
    ]
)
_CITIES = tuple(["Paris", "Rome", "Oslo", "Bern", "Kyoto", "Lima", "Cairo", "Delhi"])
_ITEMS = tuple(
    [
        "apple",
        "bread",
        "chair",
        "desk",
        "lamp",
        "pen",
        "phone",
        "shoe",
        "table",
        "tea",
        "watch",
        "book",
    ]
)
_COLOURS = tuple(["red", "blue", "green", "black", "white", "grey"])
_BOOKS = tuple(
    [
        "Emma",
        "Dune",
        "Ulysses",
        "Faust",
        "Hamlet",
        "Iliad",
        "Beloved",
        "Momo",
        "Lolita",
        "Walden",
        "Utopia",
        "Persepolis",
    ]
)
_GENRES = tuple(["drama", "comedy", "poetry", "history", "crime", "travel"])

SCHEMAS = (
    Schema("staff", (("name", _PEOPLE), ("city", _CITIES)), ("age", "salary")),
    Schema("students", (("name", _PEOPLE), ("city", _CITIES)), ("grade", "age")),
    Schema("items", (("item", _ITEMS), ("color", _COLOURS)), ("price", "stock")),
    Schema("orders", (("item", _ITEMS), ("city", _CITIES)), ("price", "amount")),
    Schema("books", (("title", _BOOKS), ("genre", _GENRES)), ("pages", "year")),
)

_AGGREGATES = (("sum", "SUM"), ("highest", "MAX"), ("lowest", "MIN"), ("average", "AVG"))
_COMPARISONS = (("above", ">"), ("below", "<"), ("equal to", "="), ("at least", ">="))

# Runs in the sandbox: the model's statement sees a fresh database and nothing else.
_RUNNER = """
import json, sqlite3, sys
task = json.load(sys.stdin)
db = sqlite3.connect(":memory:")
db.executescript(task["setup"])
denied = (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA)
db.set_authorizer(lambda op, *_: sqlite3.SQLITE_DENY if op in denied else sqlite3.SQLITE_OK)
try:
    cursor = db.execute(task["statement"])
    rows, error = (cursor.fetchmany(20) if cursor.description else None), None
except (sqlite3.Error, sqlite3.Warning) as problem:
    rows, error = None, str(problem)
db.set_authorizer(None)
try:
    state = db.execute(task["dump"]).fetchall()
except sqlite3.Error:
    state = None
json.dump({"rows": rows, "error": error, "state": state}, sys.stdout)
"""


@dataclass(frozen=True, kw_only=True)
class DatabaseProblem(Problem):
    """A question or a change over one generated table.

    Attributes:
        setup: the script that makes the table.
        dump: the query that lists the table's rows in a fixed order.
        state: the rows a correct agent leaves; those of the start when it is a question.
        changes: whether the table is to be changed rather than asked.
    """

    setup: str
    dump: str
    state: list[list[Any]]
    changes: bool


@dataclass(frozen=True)
class DatabaseTask:
    """SQL agent of two turns on SQLite."""

    name: Literal["database"] = "database"

    def problems(
        self, split: Split, count: int, *, seed: int = 0, difficulty: int = 1
    ) -> list[DatabaseProblem]:
        """Draw ``count`` distinct problems of one split."""
        return draw_problems(make_problem, split, count, seed, difficulty)

    def episode(self, problem: Problem) -> Episode:
        """Ask for SQL, run it, show the result, ask for the answer; score answer and table."""
        assert isinstance(problem, DatabaseProblem)
        history = [Message("user", problem.prompt)]
        text = str((yield Ask(tuple(history))))
        marker, _, statement = strip_fence(text).partition("SQL:")
        if marker.strip() or not statement.strip():
            return 0.0  # no statement: there is nothing to run, and so nothing to answer from
        payload = {"setup": problem.setup, "statement": statement.strip(), "dump": problem.dump}
        outcome = yield Run(Job(kind="python", source=_RUNNER, stdin=json.dumps(payload)))
        assert isinstance(outcome, Outcome)
        if outcome.status != "ok":
            return 0.0
        result = json.loads(outcome.stdout)
        failed = result["error"] is not None
        observation = f"error: {result['error'][:60]}" if failed else show_rows(result["rows"])
        history += [Message("assistant", text), Message("user", observation)]
        answer = str((yield Ask(tuple(history))))
        if failed or result["state"] != problem.state:
            return 0.0
        if problem.changes:
            return float(answer.startswith("Answer:"))
        # An answer that the result did not show is a guess, be it right.
        right = problem.answers[-1]
        return float(answer.strip() == right and right.removeprefix("Answer: ") in observation)


def show_rows(rows: list[list[Any]] | None) -> str:
    """Write the rows of a result the way the agent sees them; None is a statement without rows."""
    if rows is None:
        return "ok"
    if not rows:
        return "no rows"
    return "; ".join(", ".join(show_value(value) for value in row) for row in rows)[:200]


def show_value(value: Any) -> str:
    """Write one SQL value: integral floats without the fraction, others with one digit."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.1f}"
    return "none" if value is None else str(value)


def make_problem(rng: random.Random, difficulty: int) -> DatabaseProblem:
    """Draw one problem; difficulty 2 and more joins that many conditions."""
    while True:
        problem = _draw_problem(rng, difficulty)
        if not problem.changes:
            return problem
        before = _run(problem.setup, problem.dump, problem.dump)[1]
        if problem.state != before:
            return problem  # else doing nothing would be right: draw again


def _draw_problem(rng: random.Random, difficulty: int) -> DatabaseProblem:
    schema = rng.choice(SCHEMAS)
    kind, draw = rng.choice(
        (
            ("count", _draw_count),
            ("aggregate", _draw_aggregate),
            ("lookup", _draw_lookup),
            ("update", _draw_update),
            ("insert", _draw_insert),
        )
    )
    request, sql = draw(rng, schema, difficulty)
    columns = [name for name, _ in schema.text] + list(schema.numbers)
    prompt = f"Table {schema.table} ({', '.join(columns)}). {request}"
    setup, dump = _make_table(random.Random(prompt), schema)
    rows, state = _run(setup, sql, dump)
    changes = kind in ("update", "insert")
    return DatabaseProblem(
        prompt=prompt,
        answers=(f"SQL: {sql}", "Answer: done" if changes else f"Answer: {show_rows(rows)}"),
        solution=sql,
        observations=(show_rows(rows),),
        document=f"-- {request}\n{sql};\n-- {show_rows(rows)}",
        kind=kind,
        setup=setup,
        dump=dump,
        state=state,
        changes=changes,
    )


def _draw_condition(rng: random.Random, schema: Schema) -> tuple[str, str]:
    if rng.random() < 0.5:
        column, words = rng.choice(schema.text)
        word = rng.choice(words)
        return f"{column} {word}", f"{column} = '{word}'"
    column = rng.choice(schema.numbers)
    (words_, sign), value = rng.choice(_COMPARISONS), rng.randint(10, 99)
    return f"{column} {words_} {value}", f"{column} {sign} {value}"


def _draw_conditions(rng: random.Random, schema: Schema, difficulty: int) -> tuple[str, str]:
    drawn = [_draw_condition(rng, schema) for _ in range(difficulty)]
    return " and ".join(w for w, _ in drawn), " AND ".join(c for _, c in drawn)


def _draw_count(rng: random.Random, schema: Schema, difficulty: int) -> tuple[str, str]:
    words, condition = _draw_conditions(rng, schema, difficulty)
    template = rng.choice(("How many {t} have {w}?", "Count the {t} with {w}."))
    return (
        template.format(t=schema.table, w=words),
        f"SELECT COUNT(*) FROM {schema.table} WHERE {condition}",
    )


def _draw_aggregate(rng: random.Random, schema: Schema, difficulty: int) -> tuple[str, str]:
    (word, function), column = rng.choice(_AGGREGATES), rng.choice(schema.numbers)
    sql = f"SELECT {function}({column}) FROM {schema.table}"
    if difficulty == 1 and rng.random() < 0.3:
        return f"What is the {word} {column} of all {schema.table}?", sql
    words, condition = _draw_conditions(rng, schema, difficulty)
    template = rng.choice(
        ("What is the {f} {c} of the {t} with {w}?", "Give the {f} {c} of {t} that have {w}.")
    )
    request = template.format(f=word, c=column, t=schema.table, w=words)
    return request, f"{sql} WHERE {condition}"


def _draw_lookup(rng: random.Random, schema: Schema, difficulty: int) -> tuple[str, str]:
    (key, words), column = schema.text[0], rng.choice(schema.numbers)
    word = rng.choice(words)
    if rng.random() < 0.5:
        request = rng.choice(("What is the {c} of {w}?", "Find the {c} of {w}."))
        return (
            request.format(c=column, w=word),
            f"SELECT {column} FROM {schema.table} WHERE {key} = '{word}'",
        )
    direction, order = rng.choice((("highest", "DESC"), ("lowest", "ASC")))
    where = ""
    if difficulty > 1:
        more, condition = _draw_conditions(rng, schema, difficulty - 1)
        where, request = (
            f" WHERE {condition}",
            f"Which {key} with {more} has the {direction} {column}?",
        )
    else:
        request = f"Which {key} has the {direction} {column}?"
    return request, f"SELECT {key} FROM {schema.table}{where} ORDER BY {column} {order} LIMIT 1"


def _draw_update(rng: random.Random, schema: Schema, difficulty: int) -> tuple[str, str]:
    words, condition = _draw_conditions(rng, schema, difficulty)
    column, value = rng.choice(schema.numbers), rng.randint(10, 99)
    if rng.random() < 0.5:
        request = f"Set the {column} to {value} for {schema.table} with {words}."
        return request, f"UPDATE {schema.table} SET {column} = {value} WHERE {condition}"
    request = f"Raise the {column} by {value} for {schema.table} with {words}."
    return request, f"UPDATE {schema.table} SET {column} = {column} + {value} WHERE {condition}"


def _draw_insert(rng: random.Random, schema: Schema, difficulty: int) -> tuple[str, str]:
    values: list[Any] = [rng.choice(words) for _, words in schema.text]
    values += [rng.randint(10, 99) for _ in schema.numbers]
    listed = ", ".join(str(v) for v in values)
    quoted = ", ".join(f"'{v}'" if isinstance(v, str) else str(v) for v in values)
    template = rng.choice(("Add {v} to {t}.", "Insert a row into {t}: {v}."))
    return (
        template.format(v=listed, t=schema.table),
        f"INSERT INTO {schema.table} VALUES ({quoted})",
    )


def _make_table(rng: random.Random, schema: Schema) -> tuple[str, str]:
    """Write the script that fills the table: one row per word of the first text column."""
    (key, words), (other, choices) = schema.text
    rows = []
    spread = {column: rng.sample(range(10, 100), len(words)) for column in schema.numbers}
    for index, word in enumerate(rng.sample(words, len(words))):
        numbers = [spread[column][index] for column in schema.numbers]
        rows.append(f"('{word}', '{rng.choice(choices)}', {', '.join(map(str, numbers))})")
    types = [f"{key} TEXT", f"{other} TEXT", *(f"{column} INTEGER" for column in schema.numbers)]
    setup = f"CREATE TABLE {schema.table} ({', '.join(types)});\n"
    setup += f"INSERT INTO {schema.table} VALUES {', '.join(rows)};"
    # "main", or else a temporary view of the same name would be listed in its place.
    return setup, f"SELECT * FROM main.{schema.table} ORDER BY 1, 2, 3, 4"


def _run(setup: str, sql: str, dump: str) -> tuple[list[list[Any]] | None, list[list[Any]]]:
    """Run the generator's own statement (never a model's) to learn the right answer."""
    with sqlite3.connect(":memory:") as db:
        db.executescript(setup)
        cursor = db.execute(sql)
        rows = [list(row) for row in cursor.fetchall()] if cursor.description else None
        state = [list(row) for row in db.execute(dump).fetchall()]
    db.close()
    return rows, state
