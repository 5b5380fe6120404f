"""DBBench: an agent of several turns that asks or changes a database, as in AgentBench v0.2."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cycleqd_jax.tasks.base import Ask, Episode, Message, Problem
from cycleqd_jax.tasks.benchmark import BenchmarkTask, data_folder
from cycleqd_jax.tasks.dbbench import prompt
from cycleqd_jax.tasks.dbbench.backend import Backend, Session
from cycleqd_jax.tasks.dbbench.errors import OutOfLimits
from cycleqd_jax.tasks.dbbench.records import Record, in_paper, read_records
from cycleqd_jax.tasks.dbbench.scoring import same_answer

Choice = Literal["all", "loadable", "paper"]


@dataclass(frozen=True, kw_only=True)
class DBBenchProblem(Problem):
    """A question or a change over one table of the public files.

    Attributes:
        record: the table, and what is right.
    """

    record: Record

    @property
    def demonstration(self) -> tuple[Message, ...]:
        """The whole ideal conversation, with the instruction before it."""
        question, *rest = super().demonstration
        return (*prompt.opening(question.content), *rest)


@dataclass(frozen=True)
class DBBenchTask(BenchmarkTask[DBBenchProblem]):
    """SQL agent of AgentBench v0.2.

    Attributes:
        records: the problems, `read_records`.
        backend: where the statements run.
        rounds: statements an agent may run before it has to answer.
        name: the name scores are reported under.
    """

    records: tuple[Record, ...]
    backend: Backend
    rounds: int = 5
    name: str = "dbbench"

    def make_problems(self) -> Iterator[DBBenchProblem]:
        """Make every record a problem."""
        return map(make_problem, self.records)

    def episode(self, problem: Problem) -> Episode:
        """Play up to ``rounds`` statements and an answer; score 1.0 or 0.0."""
        assert isinstance(problem, DBBenchProblem)
        session = self.backend.session(problem.record.table)
        try:
            return (yield from self._play(problem.record, session))
        except OutOfLimits:
            return 0.0
        finally:
            session.close()

    def _play(self, record: Record, session: Session) -> Episode:
        history = prompt.opening(record.question)
        text = str((yield Ask(history)))
        understood = True
        for _ in range(self.rounds):
            if not prompt.wants_operation(text):
                break
            statement = prompt.find_statement(text)
            if statement is None:
                understood = False
                break
            reply = yield from session.execute(statement)
            history += (Message("assistant", text), Message("user", reply))
            text = str((yield Ask(history)))
        if record.changes:
            # As in the original, whatever the answer is, or if there is none.
            return float((yield from session.table_hash()) == record.answer_md5)
        answer = prompt.find_answer(text) if understood else None
        return float(answer is not None and same_answer(answer, record.labels))


def make_problem(record: Record) -> DBBenchProblem:
    """A record as a problem; its answers are those of an ideal agent."""
    answers: tuple[str, ...] = (prompt.write_answer(record.labels),)
    observations: tuple[str, ...] = ()
    if record.changes:
        answers = (prompt.write_operation(record.labels[0]), prompt.write_answer(("done",)))
        observations = ("[]",)
    return DBBenchProblem(
        prompt=record.question,
        answers=answers,
        # A table that several questions are about stays in one split.
        solution=record.table.name.lower(),
        observations=observations,
        document=f"{record.question}\n{', '.join(record.labels)}",
        kind=record.kind,
        record=record,
    )


def open_dbbench(
    folder: Path, *, choice: Choice = "all", database: str | None = None, rounds: int = 5
) -> DBBenchTask:
    """DBBench from a folder of the user's.

    Args:
        folder: holds ``standard.jsonl`` and ``dev.jsonl``.
        choice: "all" records, or else it is an error; "loadable", those that MySQL can load, 355 of
            the public 360; "paper", those of them that CycleQD evaluates on.
        database: None for SQLite in the sandbox, or a server's ``mysql://…``.
        rounds: statements an agent may run.

    Raises:
        ValueError: missing or irregular files, or no server; the message says what to do.
        ImportError: a package is not installed.
    """
    records: Iterable[Record] = read_records(
        folder, irregular="error" if choice == "all" else "skip"
    )
    if choice == "paper":
        records = filter(in_paper, records)
    name = "dbbench" if choice == "all" else f"dbbench/{choice}"
    return DBBenchTask(tuple(records), _open_backend(database), rounds, name)


def dbbench_from_environment(choice: Choice = "all") -> DBBenchTask:
    """DBBench where the environment says it is.

    ``$CYCLEQD_DATA`` is a folder with ``agentbench/dbbench`` in it, ``$CYCLEQD_DB`` a server's
    ``mysql://…`` (SQLite when it is not set).

    Raises:
        ValueError: see `open_dbbench`, or ``$CYCLEQD_DATA`` is not set.
    """
    folder = data_folder(
        "dbbench",
        "agentbench/dbbench",
        "standard.jsonl and dev.jsonl (the files of AgentBench v0.2's data/dbbench)",
    )
    return open_dbbench(folder, choice=choice, database=os.environ.get("CYCLEQD_DB") or None)


def _open_backend(database: str | None) -> Backend:
    if database is None:
        from cycleqd_jax.tasks.dbbench.sqlite import SQLiteBackend

        return SQLiteBackend()
    from cycleqd_jax.tasks.dbbench.mysql import MySQLBackend

    return MySQLBackend(database)
