"""The batched agent loop: every live episode of every candidate and task in one batch a round."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cycleqd_jax.sandbox.base import Sandbox
from cycleqd_jax.tasks.base import Ask, Call, Episode, Policy, Problem, Request, Run, Task

# Calls wait for a server rather than compute: more of them than processors.
_CALLERS = 16


@dataclass(frozen=True)
class Rollout:
    """How a population did.

    Attributes:
        solved: task name → (candidates, problems) float32, the score of every episode.
        scores: (candidates, tasks) float32, the means of those, in the order of the tasks.
        seconds: time spent in the "model" and in the "sandbox", where other services count too.
        requests: messages the model was asked for.
    """

    solved: Mapping[str, np.ndarray]
    seconds: Mapping[str, float]
    requests: int
    scores: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        means = [solved.mean(axis=1) for solved in self.solved.values()]
        object.__setattr__(self, "scores", np.stack(means, axis=1).astype(np.float32))


class _Live(NamedTuple):
    """An episode that waits for something, and where its score goes."""

    episode: Episode
    candidate: int
    task: str
    problem: int


class _Called:
    """A call under way; its time begins when a thread takes it up."""

    def __init__(self, call: Call, callers: ThreadPoolExecutor) -> None:
        self._call = call
        self._begun = threading.Event()
        self._start = 0.0
        self._future: Future[Any] = callers.submit(self._run)

    def _run(self) -> Any:
        self._start = time.monotonic()
        self._begun.set()
        return self._call.function()

    def result(self) -> tuple[Any, Exception | None]:
        """The function's result or its error, a TimeoutError when it is too slow."""
        self._begun.wait()
        try:
            left = self._start + self._call.seconds - time.monotonic()
            return self._future.result(max(left, 0.0)), None
        except Exception as error:
            return None, error


def rollout(
    tasks: Sequence[Task],
    problems: Mapping[str, Sequence[Problem]],
    candidates: int,
    policy: Policy,
    sandbox: Sandbox,
    on_progress: Callable[[int], None] = lambda finished: None,
) -> Rollout:
    """Play every problem of every task with every candidate.

    Args:
        tasks: the skills, in the order of the columns of ``scores``.
        problems: task name → the problems to play.
        candidates: how many candidates there are; requests carry their number.
        policy: answers all requests of a round at once.
        sandbox: runs all programs of a round at once, while threads wait for other services.
        on_progress: called after each round with the number of episodes that have ended so far.

    Raises:
        ValueError: a task has no problems, or the policy returned a wrong number of answers.
    """
    for task in tasks:
        if not problems.get(task.name):
            raise ValueError(f"expected problems for task {task.name!r}, found none")
    solved = {
        task.name: np.full((candidates, len(problems[task.name])), np.nan, np.float32)
        for task in tasks
    }
    seconds = {"model": 0.0, "sandbox": 0.0}
    asking: list[tuple[_Live, Ask]] = []
    running: list[tuple[_Live, Run]] = []
    calling: list[tuple[_Live, _Called]] = []
    callers = ThreadPoolExecutor(_CALLERS, "episode")

    def advance(live: _Live, answer: Any, error: Exception | None = None) -> None:
        try:
            step = live.episode.throw(error) if error else live.episode.send(answer)
        except StopIteration as end:
            solved[live.task][live.candidate, live.problem] = end.value
            return
        if isinstance(step, Ask):
            asking.append((live, step))
        elif isinstance(step, Run):
            running.append((live, step))
        else:
            calling.append((live, _Called(step, callers)))

    try:
        for candidate in range(candidates):
            for task in tasks:
                for index, problem in enumerate(problems[task.name]):
                    advance(_Live(task.episode(problem), candidate, task.name, index), None)
        episodes, requests = len(asking) + len(running) + len(calling), 0
        while asking or running or calling:
            batch, asking = asking, []
            answers = _ask(policy, batch, seconds)
            requests += len(batch)
            for (live, _), answer in zip(batch, answers, strict=True):
                advance(live, answer)
            jobs, running = running, []
            called, calling = calling, []
            started = time.perf_counter()
            outcomes = sandbox.run([run.job for _, run in jobs]) if jobs else []
            results = [call.result() for _, call in called]
            seconds["sandbox"] += time.perf_counter() - started
            for (live, _), outcome in zip(jobs, outcomes, strict=True):
                advance(live, outcome)
            for (live, _), (result, error) in zip(called, results, strict=True):
                advance(live, result, error)
            on_progress(episodes - len(asking) - len(running) - len(calling))
    finally:
        callers.shutdown(wait=False, cancel_futures=True)
    return Rollout(solved=solved, seconds=seconds, requests=requests)


def _ask(
    policy: Policy, batch: Sequence[tuple[_Live, Ask]], seconds: dict[str, float]
) -> list[str]:
    if not batch:
        return []
    started = time.perf_counter()
    answers = policy([Request(live.candidate, ask.messages) for live, ask in batch])
    seconds["model"] += time.perf_counter() - started
    if len(answers) != len(batch):
        raise ValueError(
            f"expected {len(batch)} answers from the policy, one a request, found {len(answers)}"
        )
    return answers
