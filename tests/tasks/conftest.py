"""A real sandbox for the whole room, and a scripted agent to try it with."""

from collections.abc import Callable, Iterator, Sequence

import pytest

from cycleqd_jax.sandbox import Limits, Sandbox, open_sandbox
from cycleqd_jax.tasks.base import Problem, Request, Task
from cycleqd_jax.tasks.rollout import rollout

Score = Callable[..., list[float]]


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """Roomy: a right program is never too slow on a busy machine."""
    with open_sandbox(limits=Limits(seconds=30.0), workers=2) as opened:
        yield opened


@pytest.fixture(scope="session")
def hasty() -> Iterator[Sandbox]:
    """For programs that are expected to run out of time."""
    with open_sandbox(limits=Limits(seconds=0.5), workers=1) as opened:
        yield opened


@pytest.fixture
def score(sandbox: Sandbox) -> Score:
    """``score(task, problem, attempts)``: one score an attempt, an attempt is one text a turn."""

    def play(
        task: Task,
        problem: Problem,
        attempts: Sequence[Sequence[str]],
        chosen: Sandbox = sandbox,
    ) -> list[float]:
        def policy(requests: Sequence[Request]) -> list[str]:
            return [attempts[r.candidate][len(r.messages) // 2] for r in requests]

        played = rollout([task], {task.name: [problem]}, len(attempts), policy, chosen)
        return played.solved[task.name][:, 0].tolist()

    return play
