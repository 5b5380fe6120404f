"""OS interaction: an agent of several turns in a shell, as in AgentBench v0.2."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cycleqd_jax.sandbox.machines import MachineLost, Machines
from cycleqd_jax.tasks.base import Ask, Episode, Message, Problem
from cycleqd_jax.tasks.benchmark import BenchmarkTask, data_folder
from cycleqd_jax.tasks.osbench import prompt
from cycleqd_jax.tasks.osbench.backend import Backend
from cycleqd_jax.tasks.osbench.offline import not_offline
from cycleqd_jax.tasks.osbench.records import Record, in_paper, read_records
from cycleqd_jax.tasks.osbench.session import SCRIPT_SECONDS, TURN_SECONDS, Session

Choice = Literal["all", "offline", "paper"]


@dataclass(frozen=True, kw_only=True)
class OSBenchProblem(Problem):
    """A question or a chore from the public files.

    Attributes:
        record: how the system is set up, and what is right.
    """

    record: Record

    @property
    def demonstration(self) -> tuple[Message, ...]:
        """The ideal conversation, with instruction and example before it.

        Of problems that are checked it has the first turn only: what comes back is known to nobody
        but the system.
        """
        question, *rest = super().demonstration
        return (*prompt.opening(question.content), *rest)

    def ideal_answer(self, turn: int, heard: str) -> str:
        """The reference solution, then the last line that it printed."""
        if turn < len(self.answers):
            return self.answers[turn]
        lines = heard.splitlines()
        return prompt.write_commit(lines[-1] if len(lines) > 1 else None)


@dataclass(frozen=True)
class OSBenchTask(BenchmarkTask[OSBenchProblem]):
    """Shell agent of AgentBench v0.2.

    Attributes:
        records: the problems, `read_records`.
        backend: where the systems are.
        rounds: turns an agent has, the last of which has to answer or finish.
        turn_seconds: how long a command is waited for.
        script_seconds: time of each script of a problem.
        name: the name scores are reported under.
    """

    records: tuple[Record, ...]
    backend: Backend
    rounds: int = 8
    turn_seconds: float = TURN_SECONDS
    script_seconds: float = SCRIPT_SECONDS
    name: str = "osbench"

    def make_problems(self) -> Iterator[OSBenchProblem]:
        """Make every record a problem."""
        return map(make_problem, self.records)

    def episode(self, problem: Problem) -> Episode:
        """Play up to ``rounds`` turns; score 1.0 or 0.0."""
        assert isinstance(problem, OSBenchProblem)
        session = Session(self.backend, problem.record, self.turn_seconds, self.script_seconds)
        try:
            return float((yield from self._play(problem.record, session)))
        except MachineLost:
            return 0.0
        finally:
            session.close()

    def _play(self, record: Record, session: Session) -> Episode:
        yield from session.set_up()
        history = prompt.opening(record.description)
        for _ in range(self.rounds):
            text = str((yield Ask(history)))
            action = prompt.find_action(text)
            if action is None:
                return 0.0
            if isinstance(action, prompt.Commit):
                if record.match is None:
                    return (yield from session.judge(action.answer))
                return action.answer is not None and action.answer.strip() == record.match
            output = yield from session.type(action.code)
            shown = prompt.write_output(output)
            history += (Message("assistant", text), Message("user", shown))
        return 0.0


def make_problem(record: Record) -> OSBenchProblem:
    """A record as a problem; its answers are those of an ideal agent, as far as they are known."""
    if record.match is not None:
        answer = prompt.write_commit(record.match)
    else:
        answer = prompt.write_bash(record.example.code if record.example else "true")
    return OSBenchProblem(
        prompt=record.description,
        answers=(answer,),
        solution=record.group,
        document=f"{record.description}\n{answer}",
        kind=record.kind,
        record=record,
    )


def open_osbench(
    folder: Path, *, choice: Choice = "all", docker: str | None = None, rounds: int = 8
) -> OSBenchTask:
    """OS interaction from a folder of the user's.

    Args:
        folder: holds AgentBench v0.2's ``data/os_interaction``.
        choice: "all" problems; "offline", those that the reference solutions solve without a
            network; "paper", those that CycleQD evaluates on.
        docker: None for private machines in the sandbox, or the name of a Docker image.
        rounds: turns an agent has: 8 in v0.2, 5 in CycleQD.

    Raises:
        ValueError: missing or irregular files, or no Docker engine; the message says what to do.
        SandboxUnavailable: no private machine works here; the message says what to do.
        ImportError: the docker package is not installed.
    """
    records: Iterable[Record] = read_records(
        folder, irregular="skip" if choice == "offline" else "error"
    )
    backend = _open_backend(docker)
    if choice == "offline":
        left_out = not_offline(backend.users)
        records = (record for record in records if record.id not in left_out)
    elif choice == "paper":
        records = filter(in_paper, records)
    name = "osbench" if choice == "all" else f"osbench/{choice}"
    return OSBenchTask(tuple(records), backend, rounds, name=name)


def osbench_from_environment(choice: Choice = "all") -> OSBenchTask:
    """OS interaction where the environment says it is.

    ``$CYCLEQD_DATA`` is a folder with ``agentbench/os_interaction`` in it, ``$CYCLEQD_OS_IMAGE``
    the Docker image to use (private machines in the sandbox when it is not set). The paper's
    problems are played in the paper's 5 rounds, the others in the benchmark's 8.

    Raises:
        ValueError: see `open_osbench`, or ``$CYCLEQD_DATA`` is not set.
        SandboxUnavailable: see `open_osbench`.
    """
    folder = data_folder(
        "osbench",
        "agentbench/os_interaction",
        "data/*/*.json and data/dev.json (AgentBench v0.2's data/os_interaction)",
    )
    image = os.environ.get("CYCLEQD_OS_IMAGE") or None
    rounds = 5 if choice == "paper" else 8
    return open_osbench(folder, choice=choice, docker=image, rounds=rounds)


def _open_backend(docker: str | None) -> Backend:
    if docker is None:
        return Machines()
    from cycleqd_jax.tasks.osbench.containers import Containers

    return Containers(docker)
