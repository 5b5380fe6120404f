"""Slow, dead and broken environments: each costs its own episode and is seen."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from cycleqd_jax.sandbox import Job, Outcome, Sandbox, SandboxBroken
from cycleqd_jax.tasks.base import (
    Ask,
    Call,
    Episode,
    Message,
    Problem,
    Request,
    Run,
    ServiceGone,
    Split,
)
from cycleqd_jax.tasks.played import Rollout
from cycleqd_jax.tasks.policies import ScriptedPolicy
from cycleqd_jax.tasks.rollout import TimeLimits, rollout

Play = Callable[[Problem], Episode]


@dataclass
class Played:
    """A task whose episodes are a function's; what was closed is noted."""

    play: Play
    name: str = "played"
    closed: list[str] = field(default_factory=list)

    def problems(
        self, split: Split, count: int, *, seed: int = 0, difficulty: int = 1
    ) -> list[Problem]:
        return [
            Problem(prompt=str(i), answers=("",), solution="", document="", kind="k")
            for i in range(count)
        ]

    def episode(self, problem: Problem) -> Episode:
        try:
            return (yield from self.play(problem))
        finally:
            self.closed.append(problem.prompt)


@dataclass
class Broken:
    """A sandbox that says how long programs took, or what is wrong with it."""

    seconds: float = 0.0
    error: Exception | None = None
    pause: float = 0.0

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        time.sleep(self.pause)
        if self.error is not None:
            raise self.error
        return [Outcome("ok", 0, "", "", seconds=self.seconds) for _ in jobs]

    def close(self) -> None: ...

    def __enter__(self) -> "Broken":
        return self

    def __exit__(self, *exc: object) -> None: ...


def play(
    task: Any, count: int, sandbox: Any = None, speak: Any = lambda r: "", **more: Any
) -> Rollout:
    problems = {task.name: task.problems("search", count)}
    return rollout([task], problems, 1, ScriptedPolicy(speak), sandbox or Broken(), **more)


def ask(text: str) -> Ask:
    return Ask((Message("user", text),))


def test_a_slow_environment_delays_only_its_own_episode() -> None:
    released = threading.Event()
    finished: list[str] = []

    def turns(problem: Problem) -> Episode:
        for turn in range(3):
            yield ask(f"{problem.prompt}/{turn}")
            if problem.prompt == "0":
                yield Call(lambda: released.wait(20), 30.0)
        finished.append(problem.prompt)
        if len(finished) == 40:
            released.set()
        return 1.0

    started = time.monotonic()
    played = play(Played(turns), 41, patience=0.01)
    assert released.is_set()
    assert finished[-1] == "0"
    assert played.scores == 1.0
    assert time.monotonic() - started < 10


def test_a_call_may_have_all_the_time_there_is() -> None:
    def turns(problem: Problem) -> Episode:
        return float((yield Call(lambda: not threading.Event().wait(0.05), math.inf)))

    limits = TimeLimits(step=math.inf, episode=math.inf)
    assert play(Played(turns), 2, limits=limits).scores == 1.0


def test_environments_work_while_the_model_speaks() -> None:
    called, spoken = threading.Event(), threading.Event()

    def wait() -> bool:
        called.set()
        return spoken.wait(20)

    def turns(problem: Problem) -> Episode:
        yield ask(problem.prompt)
        if problem.prompt == "0":
            return float((yield Call(wait, 30.0)))
        yield ask("second")
        return 1.0

    def speak(request: Request) -> str:
        if request.messages[0].content == "second":
            assert called.wait(20)
            spoken.set()
        return ""

    assert play(Played(turns), 2, speak=speak, patience=0.0).scores == 1.0


def test_those_that_come_in_fast_are_waited_for() -> None:
    batches: list[int] = []

    def turns(problem: Problem) -> Episode:
        yield ask(problem.prompt)
        # One after the other, each later than the patience in all but the first few cases.
        yield Call(lambda: time.sleep(0.02 * int(problem.prompt)), 30.0)
        yield ask("second")
        return 1.0

    def policy(requests: Sequence[Request]) -> list[str]:
        batches.append(len(requests))
        return [""] * len(requests)

    task = Played(turns)
    rollout([task], {task.name: task.problems("search", 20)}, 1, policy, Broken(), patience=0.25)
    assert batches == [20, 20]


@pytest.mark.parametrize(
    ("limits", "calls"), [(TimeLimits(step=0.1), 1), (TimeLimits(episode=0.3), 3)]
)
def test_an_episode_over_a_limit_scores_zero_and_cleans_up(limits: TimeLimits, calls: int) -> None:
    made: list[int] = []

    def turns(problem: Problem) -> Episode:
        yield ask(problem.prompt)
        while problem.prompt == "1":
            made.append(1)
            yield Call(lambda: time.sleep(0.14), 30.0)
        return 1.0

    task = Played(turns)
    played = play(task, 3, limits=limits)
    np.testing.assert_array_equal(played.solved["played"], [[1, 0, 1]])
    assert (played.late, played.failed, played.unplayable) == ({"played": 1}, {"played": 0}, [])
    assert len(made) == calls
    assert sorted(task.closed) == ["0", "1", "2"]


def test_the_time_of_a_program_counts_and_its_wait_does_not(sandbox: Sandbox) -> None:
    def turns(problem: Problem) -> Episode:
        yield ask("")
        outcome = yield Run(Job("python", "import time; time.sleep(0.1)"))
        assert 0.08 < outcome.seconds < 2
        return 1.0

    assert play(Played(turns), 2, sandbox).scores == 1.0
    waited = play(Played(turns), 2, Broken(seconds=0.1, pause=0.4), limits=TimeLimits(step=0.2))
    assert waited.scores == 1.0
    slow = play(Played(turns), 2, Broken(seconds=3.0), limits=TimeLimits(step=2.0))
    assert slow.late == {"played": 2}
    assert slow.unplayable == ["played"]


def test_a_slow_program_does_not_hold_back_the_others_of_its_batch(sandbox: Sandbox) -> None:
    order: list[str] = []

    def turns(problem: Problem) -> Episode:
        yield ask("")
        pause = 0.7 if problem.prompt == "0" else 0
        yield Run(Job("python", f"import time; time.sleep({pause}) # {problem.prompt}"))
        order.append(problem.prompt)
        return 1.0

    play(Played(turns), 9, sandbox)
    assert order.index("0") > 5


@pytest.mark.parametrize("callers_dead", [70])
def test_dead_calls_leave_their_threads_to_others(callers_dead: int) -> None:
    released = threading.Event()

    def turns(problem: Problem) -> Episode:
        yield ask("")
        dead = int(problem.prompt) < callers_dead
        yield Call(lambda: released.wait(20) if dead else None, 30.0)
        return 1.0

    # More of them than threads, all before the first that lives.
    played = play(Played(turns), callers_dead + 5, limits=TimeLimits(step=0.1))
    released.set()
    assert played.late == {"played": callers_dead}
    assert played.solved["played"][0, callers_dead:].tolist() == [1.0] * 5


def test_an_error_costs_its_episode_the_score_and_is_kept() -> None:
    def turns(problem: Problem) -> Episode:
        text = yield ask(problem.prompt)
        if problem.prompt == "1":
            yield Call(lambda: int("x"), 1.0)
        return float(problem.prompt == "0" or text)

    task = Played(turns)
    played = play(task, 3)
    np.testing.assert_array_equal(played.solved["played"], [[1, 0, 0]])
    assert (played.failed, played.late, played.unplayable) == ({"played": 2}, {"played": 0}, [])
    call, number = sorted(played.errors)
    assert call.startswith("task 'played', problem 1 ('1'): ValueError: invalid literal for int()")
    assert number.startswith("task 'played', problem 2 ('2'): ValueError: could not convert string")
    assert __file__ in number
    assert sorted(task.closed) == ["0", "1", "2"]


def test_an_episode_may_handle_the_error_of_its_call() -> None:
    def turns(problem: Problem) -> Episode:
        try:
            yield Call(lambda: 1 / 0, 1.0)
        except ZeroDivisionError:
            return 1.0
        return 0.0

    assert play(Played(turns), 2).scores == 1.0


def test_when_all_fail_the_caller_can_tell() -> None:
    def turns(problem: Problem) -> Episode:
        yield ask("")
        raise RuntimeError("a bug")

    played = play(Played(turns), 8)
    assert played.unplayable == ["played"]
    assert len(played.errors) == 5
    assert played.scores == 0.0


@pytest.mark.parametrize("error", [ServiceGone("no server"), SandboxBroken("no memory")])
def test_a_lost_service_ends_the_run_whatever_the_episode_does(error: Exception) -> None:
    def lose() -> None:
        raise error

    def turns(problem: Problem) -> Episode:
        yield ask("")
        try:
            if isinstance(error, ServiceGone):
                yield Call(lose, 1.0)
            yield Run(Job("bash", ""))
        except Exception:
            return 0.0
        return 1.0

    task = Played(turns)
    with pytest.raises(type(error), match=r"no server|no memory"):
        play(task, 3, Broken(error=error))
    assert sorted(task.closed) == ["0", "1", "2"]


def test_an_unknown_step_names_task_and_problem() -> None:
    def turns(problem: Problem) -> Episode:
        yield ask("") if problem.prompt == "0" else "say something"  # type: ignore[misc]
        return 1.0

    task = Played(turns)
    message = r"task 'played', problem 1 \('1'\): expected .* Ask, Run or Call, found 'say some"
    with pytest.raises(ValueError, match=message):
        play(task, 2)
    assert sorted(task.closed) == ["0", "1"]


@pytest.mark.parametrize("score", [1.01, -0.5, float("nan"), None, "best"])
def test_a_score_out_of_range_names_task_and_problem(score: Any) -> None:
    def turns(problem: Problem) -> Episode:
        yield ask("")
        return score if problem.prompt == "1" else True

    message = r"task 'played', problem 1 \('1'\): expected a score in \[0, 1\], found "
    with pytest.raises(ValueError, match=message):
        play(Played(turns), 2)


def test_an_episode_that_is_no_generator_names_task_and_problem() -> None:
    class Plain(Played):
        def episode(self, problem: Problem) -> Any:
            return 1.0

    message = r"task 'played', problem 0 \('0'\): expected episode\(\) to be a generator .* float"
    with pytest.raises(ValueError, match=message):
        play(Plain(lambda problem: ask("")), 1)  # type: ignore[arg-type,return-value]


def test_an_answer_that_is_no_text_names_task_and_problem() -> None:
    def turns(problem: Problem) -> Episode:
        yield ask("")
        return 1.0

    message = r"problem 1 \('1'\): expected a text from the policy, found NoneType"
    task = Played(turns)
    policy: Any = lambda requests: ["", None]  # noqa: E731
    with pytest.raises(ValueError, match=message):
        rollout([task], {task.name: task.problems("search", 2)}, 1, policy, Broken())


@pytest.mark.parametrize("name", ["step", "episode"])
def test_time_limits_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"time limit of a {name}: expected more than 0 s, found"):
        TimeLimits(**{name: 0.0})
