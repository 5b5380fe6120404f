"""DBBench on SQLite, in the sandbox.

A program of the sandbox ends with its statement, so a session is the list of changes made so far:
each statement runs in a fresh database in memory after them. Equal statements on equal tables are
equal programs, which a `MemoSandbox` runs once.
"""

import json
from functools import lru_cache
from pathlib import Path

from cycleqd_jax.sandbox.base import Job, Outcome
from cycleqd_jax.tasks.base import Run
from cycleqd_jax.tasks.dbbench import scoring
from cycleqd_jax.tasks.dbbench.backend import Steps
from cycleqd_jax.tasks.dbbench.dialect import translate
from cycleqd_jax.tasks.dbbench.errors import AgentError, OutOfLimits
from cycleqd_jax.tasks.dbbench.prompt import cut_reply
from cycleqd_jax.tasks.dbbench.records import Table

# About a second of comparisons; counted, so that a busy machine gives the same scores.
INSTRUCTIONS = 5_000_000


class SQLiteBackend:
    """A database in the memory of a sandboxed program."""

    def session(self, table: Table) -> "SQLiteSession":
        """Promise a database that holds this table."""
        return SQLiteSession(table)


class SQLiteSession:
    """The changes that an episode has made to its table."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._changes: list[str] = []
        self._hash: str | None = None

    def execute(self, statement: str) -> Steps:
        """Run a model's statement; see `Session.execute`."""
        try:
            translated = translate(statement, self._table.name)
        except AgentError as error:
            return cut_reply(str(error))
        if translated is None:
            return "[]"
        payload = {
            "table": {
                "name": self._table.name,
                "columns": self._table.columns,
                "rows": self._table.rows,
            },
            "changes": self._changes,
            "statement": translated.sql,
            "instructions": INSTRUCTIONS,
        }
        outcome = yield Run(Job(kind="python", source=_runner(), stdin=json.dumps(payload)))
        assert isinstance(outcome, Outcome)
        if outcome.status != "ok":
            raise OutOfLimits(outcome.reason or outcome.stderr[-200:])
        result = json.loads(outcome.stdout)
        if translated.writes and not result["failed"]:
            self._changes.append(translated.sql)
            self._hash = result["hash"]
        return cut_reply(result["reply"])

    def table_hash(self) -> Steps:
        """The hash of the table; see `Session.table_hash`."""
        yield from ()
        return scoring.table_hash(self._table) if self._hash is None else self._hash

    def close(self) -> None:
        """Nothing outlives the sandboxed programs."""


@lru_cache
def _runner() -> str:
    return Path(__file__).with_name("runner.py").read_text(encoding="utf-8")
