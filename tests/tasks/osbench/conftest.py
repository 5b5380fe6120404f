"""Private machines for the whole room, and an agent that knows what to say."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import cycleqd_jax
from cycleqd_jax.sandbox import SandboxUnavailable
from cycleqd_jax.sandbox.machines import Machines
from cycleqd_jax.tasks.base import Ask, Call, Episode
from cycleqd_jax.tasks.osbench.records import Record
from cycleqd_jax.tasks.osbench.task import OSBenchTask

Play = Callable[..., tuple[float, list[str]]]


@pytest.fixture(scope="session")
def machines() -> Iterator[Machines]:
    try:
        opened = Machines()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    with opened:
        yield opened


def drive(episode: Episode, speak: Callable[[Ask], str]) -> float:
    """The score of an episode whose calls are made at once."""
    answer: object = None
    try:
        step = episode.send(None)
        while True:
            if isinstance(step, Ask):
                step = episode.send(speak(step))
                continue
            assert isinstance(step, Call)
            try:
                answer = step.function()
            except Exception as error:
                step = episode.throw(error)
            else:
                step = episode.send(answer)
    except StopIteration as end:
        return float(end.value)


@pytest.fixture
def play(machines: Machines) -> Play:
    """``play(record, turns)``: the score of an agent that says these turns, and what it hears."""

    def run(record: Record, turns: Sequence[str], **options: object) -> tuple[float, list[str]]:
        task = OSBenchTask((record,), machines, **options)  # type: ignore[arg-type]
        heard: list[str] = []

        def speak(ask: Ask) -> str:
            heard.append(ask.messages[-1].content)
            return turns[len(heard) - 1]

        return drive(task.episode(task.every_problem()[0]), speak), heard

    return run


@pytest.fixture(scope="session")
def public_files() -> Path:
    """The folder with the public files; `$CYCLEQD_DATA`, or shared/data beside the checkout."""
    beside = Path(cycleqd_jax.__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CYCLEQD_DATA", beside)) / "agentbench" / "os_interaction"
    if not (folder / "data" / "dev.json").is_file():
        pytest.skip(f"no OS interaction files in {folder} (set CYCLEQD_DATA)")
    return folder
