"""An agent that knows the reference solutions, on the public files."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cycleqd_jax.sandbox.machines import Machines
from cycleqd_jax.tasks.base import Ask, Request
from cycleqd_jax.tasks.osbench.offline import not_offline
from cycleqd_jax.tasks.osbench.records import Record, read_records
from cycleqd_jax.tasks.osbench.task import OSBenchTask
from cycleqd_jax.tasks.policies import ideal_policy

from .conftest import drive


def play(record: Record, machines: Machines, mute: bool = False) -> float:
    task = OSBenchTask((record,), machines, turn_seconds=60.0, script_seconds=60.0)
    (problem,) = task.every_problem()
    ideal = ideal_policy([problem])

    def say(ask: Ask) -> str:
        return "Act: finish" if mute else ideal.speak(Request(0, ask.messages))

    return drive(task.episode(problem), say)


def offline(folder: Path, machines: Machines) -> list[Record]:
    left_out = not_offline(machines.users)
    return [record for record in read_records(folder) if record.id not in left_out]


def failing(records: list[Record], machines: Machines, mute: bool = False) -> list[str]:
    with ThreadPoolExecutor(8) as threads:
        scores = list(threads.map(lambda record: play(record, machines, mute), records))
    return [record.id for record, score in zip(records, scores, strict=True) if score != 1.0]


def test_some_reference_solutions_solve_their_problems(
    public_files: Path, machines: Machines
) -> None:
    assert failing(offline(public_files, machines)[::16], machines) == []


@pytest.mark.slow
def test_every_reference_solution_solves_its_problem(
    public_files: Path, machines: Machines
) -> None:
    records = offline(public_files, machines)
    assert len(records) == (160 if machines.users else 151)
    assert failing(records, machines) == []


@pytest.mark.slow
def test_doing_nothing_solves_nothing_else_than_the_original(
    public_files: Path, machines: Machines
) -> None:
    records = offline(public_files, machines)
    unsolved = failing(records, machines, mute=True)
    # Three checks pass before anything was done: 6/new 4 judges the output of a pipe's last part.
    solved = {record.id for record in records} - set(unsolved)
    assert solved <= {"6/new/4"}
