"""The batched agent loop: the live episodes of all candidates and tasks speak in one batch.

What episodes wait for goes on in the background (`environments`). The model is asked as soon as
every live episode has a message to ask for. Some may still wait for a slow environment; then the
others wait for them as long as the last batch took: a batch that turns out to have been split
needlessly, and a wait that turns out to have been in vain, cost the same. They wait longer only
while the rest comes in so fast that it will be there in less than that time.
"""

import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from cycleqd_jax.sandbox.base import Sandbox, SandboxBroken, SandboxUnavailable
from cycleqd_jax.tasks.base import (
    Ask,
    Call,
    Conversation,
    Episode,
    Policy,
    Problem,
    Request,
    Run,
    ServiceGone,
    Speaker,
    Task,
)
from cycleqd_jax.tasks.environments import Environments, Finished, Started
from cycleqd_jax.tasks.played import ERRORS_KEPT, Rollout
from cycleqd_jax.tasks.transcript import Ended, Program, Service, Step, Transcript, Turn

# Before the first batch nobody knows how long one takes.
_FIRST_PATIENCE_SECONDS = 1.0
# No problem's fault: nothing that is played afterwards would count.
_FATAL = (ServiceGone, SandboxBroken, SandboxUnavailable)


@dataclass(frozen=True)
class TimeLimits:
    """Seconds of environments, without the model's and without waiting for one's turn.

    Attributes:
        step: of one program or call.
        episode: of all of an episode together.

    Raises:
        ValueError: a limit that is not positive.
    """

    step: float | int = 60.0
    episode: float | int = 600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"time limit of a {name}: expected more than 0 s, found {value}")


_GENEROUS = TimeLimits()


def rollout(
    tasks: Sequence[Task],
    problems: Mapping[str, Sequence[Problem]],
    candidates: int,
    policy: Policy | Speaker,
    sandbox: Sandbox,
    on_progress: Callable[[int], None] = lambda finished: None,
    *,
    repeats: int = 1,
    seed: int | str = 0,
    first_candidate: int = 0,
    limits: TimeLimits = _GENEROUS,
    patience: float | int | None = None,
    on_episode: Callable[[Transcript], None] | None = None,
    chosen: Mapping[str, np.ndarray] | None = None,
) -> Rollout:
    """Play every problem of every task with every candidate, or those that are chosen.

    Args:
        tasks: the skills, in the order of the columns of ``scores``.
        problems: task name → the problems to play.
        candidates: how many candidates there are; requests carry their number.
        policy: answers all requests of a batch at once, or each as soon as it can (`Speaker`).
        sandbox: runs programs, while threads wait for other services.
        on_progress: called with the number of episodes that have ended, when there are more.
        repeats: attempts at every problem.
        seed: of the rollout. A request's seed follows from it and from candidate, task, problem,
            repeat and turn alone.
        first_candidate: what is added to the candidates' numbers in seeds and transcripts, where
            they are a part of a larger population.
        limits: an episode that takes more scores 0 and is closed.
        patience: seconds that episodes with a request wait for those without; by default as long
            as the last batch took. Scores do not depend on it. A `Speaker` is asked at once.
        on_episode: is given the transcript of every episode as it ends; None records nothing.
        chosen: task name → (candidates, problems) bool, who plays what; None plays everything. A
            score is the same whatever else is played.

    Raises:
        ValueError: a task has no problems or breaks the protocol (the message names the problem),
            ``chosen`` has another shape, or the policy returned a wrong number of answers.
        ServiceGone, SandboxBroken: what all episodes need is lost.
    """
    for task in tasks:
        if not problems.get(task.name):
            raise ValueError(f"expected problems for task {task.name!r}, found none")
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, found {repeats}")
    everything = {t.name: np.ones((candidates, len(problems[t.name])), bool) for t in tasks}
    chosen = everything if chosen is None else chosen
    for of, every in everything.items():
        if chosen[of].shape != every.shape:
            raise ValueError(
                f"chosen, task {of!r}: expected {every.shape}, found {chosen[of].shape}"
            )
    stage = _Stage(policy, Environments(sandbox), limits, patience, on_episode)
    attempts = {
        task.name: np.full((candidates, len(problems[task.name]), repeats), np.nan, np.float32)
        for task in tasks
    }
    try:
        for candidate in range(candidates):
            for task in tasks:
                for index, problem in enumerate(problems[task.name]):
                    if not chosen[task.name][candidate, index]:
                        continue
                    for repeat in range(repeats):
                        name = first_candidate + candidate
                        key = f"{seed}\0{name}\0{task.name}\0{problem.prompt}\0{repeat}"
                        play = _Play(task, problem, index, candidate, name, repeat, key)
                        stage.enter(play, attempts[task.name])
        stage.play(on_progress)
    finally:
        stage.close()
    return Rollout(
        attempts=attempts,
        seconds=stage.seconds,
        requests=stage.requests,
        late={task.name: stage.late.get(task.name, 0) for task in tasks},
        failed={task.name: stage.failed.get(task.name, 0) for task in tasks},
        errors=tuple(stage.errors),
    )


class _Play:
    """An episode, where its score goes, and what is known of it so far."""

    def __init__(
        self,
        task: Task,
        problem: Problem,
        index: int,
        candidate: int,
        name: int,
        repeat: int,
        key: str,
    ) -> None:
        self.task = task.name
        self.prompt = problem.prompt
        self.index = index
        self.candidate = candidate
        self.name = name
        self.repeat = repeat
        self.number = 0
        self.seconds = 0.0
        self.steps: list[Step] = []
        self.request = Request(candidate, ())
        self._key = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        self._turns = 0
        self.episode: Episode = task.episode(problem)
        if not hasattr(self.episode, "send"):
            raise ValueError(
                f"{self}: expected episode() to be a generator (a function with a yield), "
                f"found {type(self.episode).__name__}"
            )

    def __str__(self) -> str:
        prompt = self.prompt if len(self.prompt) <= 60 else f"{self.prompt[:59]}…"
        return f"task {self.task!r}, problem {self.index} ({prompt!r})"

    def ask(self, ask: Ask) -> None:
        """The next request."""
        digest = blake2b(self._key + self._turns.to_bytes(4), digest_size=4).digest()
        self._turns += 1
        self.request = Request(self.candidate, ask.messages, int.from_bytes(digest) >> 1)


class _Stage:
    """All episodes of a rollout: those that ask, and those that wait for an environment."""

    def __init__(
        self,
        policy: Policy | Speaker,
        environments: Environments[_Play],
        limits: TimeLimits,
        patience: float | int | None,
        on_episode: Callable[[Transcript], None] | None,
    ) -> None:
        self.seconds = {"model": 0.0, "sandbox": 0.0}
        self.requests = 0
        self.late: dict[str, int] = {}
        self.failed: dict[str, int] = {}
        self.errors: list[str] = []
        self._environments = environments
        # One of both.
        self._policy: Policy | None = None
        self._conversation: Conversation | None = None
        if not isinstance(policy, Speaker):
            self._policy = policy
        else:
            self._conversation = policy.converse(
                lambda play, answer: environments.heard(play, Ask(play.request.messages), answer),
                environments.failed,
            )
        self._limits = limits
        self._fixed_patience = patience
        self._patience = _FIRST_PATIENCE_SECONDS if patience is None else patience
        self._on_episode = on_episode
        self._live: dict[_Play, np.ndarray] = {}
        self._ended = 0
        self._asking: list[_Play] = []
        # Since when somebody asks, until when the others are waited for, how many steps have ended
        # since then, and how many episodes may be missing at most for a longer wait.
        self._asked_since = 0.0
        self._deadline = 0.0
        self._arrived = 0
        self._awaited = math.inf
        self._begun: list[Started[_Play]] = []
        # How many wait for the model in a conversation.
        self._spoken = 0

    def enter(self, play: _Play, scores: np.ndarray) -> None:
        """Let an episode begin; its score goes to its place in (candidates, problems, repeats)."""
        play.number = len(self._live) + self._ended
        self._live[play] = scores
        self._advance(play, None)

    def play(self, on_progress: Callable[[int], None]) -> None:
        """Until every episode has ended."""
        told = 0
        while self._live:
            self._begin()
            if self._conversation is not None:
                self._ask(self._conversation)
            self._wait()
            self._begin()  # so that the environments work while the model speaks
            alone = not self._acting
            if self._policy is not None and self._asking and (alone or not self._worth_waiting()):
                self._speak(self._policy)
            if self._ended > told:
                told = self._ended
                on_progress(told)

    def close(self) -> None:
        """Close every episode that has not ended, and forget what it waits for."""
        try:
            if self._conversation is not None:
                self._conversation.close()
        finally:
            # Whoever is impatient interrupts the line above, too.
            self._environments.close()
            for play in list(self._live):
                self._close(play)

    @property
    def _acting(self) -> int:
        """How many episodes wait for an environment."""
        return len(self._live) - len(self._asking)

    def _worth_waiting(self) -> bool:
        """Whether those who ask should wait (longer) for the others."""
        now = time.monotonic()
        if now < self._deadline:
            return True
        expected = self._acting * (now - self._asked_since) / max(self._arrived, 1e-9)
        if expected > self._patience or 2 * self._acting > self._awaited:
            return False
        self._deadline, self._awaited = now + expected, self._acting
        return True

    def _begin(self) -> None:
        begun, self._begun = self._begun, []
        self._environments.start(begun)

    def _wait(self) -> None:
        if not self._acting:
            return
        started = time.monotonic()
        left = self._deadline - started if self._asking else math.inf
        finished = self._environments.collect(max(0.0, left))
        self.seconds["model" if self._spoken else "sandbox"] += time.monotonic() - started
        self._arrived += len(finished)
        said = [step for step in finished if isinstance(step.step, Ask)]
        if said and self._conversation is not None:
            self._spoken -= len(said)
            texts = self._conversation.texts([step.answer for step in said])
            for step, text in zip(said, texts, strict=True):
                self._answer(step.who, text)
        for step in finished:
            if not isinstance(step.step, Ask):
                self._take(step)

    def _batch(self) -> list[_Play]:
        """Those who ask, and from now on are answered."""
        # In the order of the episodes, whenever they asked: a full batch is always the same.
        batch = sorted(self._asking, key=lambda play: play.number)
        self._asking = []
        self.requests += len(batch)
        return batch

    def _ask(self, conversation: Conversation) -> None:
        batch = self._batch()
        if batch:
            self._spoken += len(batch)
            conversation.ask(batch, [play.request for play in batch])

    def _speak(self, policy: Policy) -> None:
        batch = self._batch()
        started = time.perf_counter()
        answers = policy([play.request for play in batch])
        took = time.perf_counter() - started
        self.seconds["model"] += took
        if self._fixed_patience is None:
            self._patience = took
        if len(answers) != len(batch):
            raise ValueError(
                f"expected {len(batch)} answers from the policy, one a request, "
                f"found {len(answers)}"
            )
        for play, answer in zip(batch, answers, strict=True):
            self._answer(play, answer)

    def _answer(self, play: _Play, text: str) -> None:
        if not isinstance(text, str):
            raise ValueError(
                f"{play}: expected a text from the policy, found {type(text).__name__}"
            )
        if self._on_episode is not None:
            play.steps.append(Turn(play.request.messages, text, play.request.seed))
        self._advance(play, text)

    def _take(self, step: Finished[_Play]) -> None:
        play = step.who
        play.seconds += step.seconds
        if self._on_episode is not None:
            record: Step
            if isinstance(step.step, Run) and step.answer is not None:
                record = Program.of(step.step.job, step.answer)
            else:
                error = TimeoutError("over the time limit") if step.late else step.error
                record = Service.of(step.answer, error, step.seconds)
            play.steps.append(record)
        if isinstance(step.error, _FATAL):
            # Not through the episode, which might take it for an answer.
            raise step.error
        if step.late:
            self.late[play.task] = self.late.get(play.task, 0) + 1
            self._end(play, 0.0, "late")
        else:
            self._advance(play, step.answer, step.error)

    def _advance(self, play: _Play, answer: Any, error: Exception | None = None) -> None:
        try:
            step = play.episode.throw(error) if error else play.episode.send(answer)
        except StopIteration as end:
            self._end(play, _checked(play, end.value), "scored")
            return
        except _FATAL:
            raise
        except Exception as raised:
            self._fail(play, raised)
            return
        if isinstance(step, Ask):
            if not self._asking:
                self._asked_since = time.monotonic()
                self._deadline = self._asked_since + self._patience
                self._arrived, self._awaited = 0, math.inf
            play.ask(step)
            self._asking.append(play)
        elif isinstance(step, (Run, Call)):
            allowed = min(self._limits.step, self._limits.episode - play.seconds)
            self._begun.append(Started(play, step, allowed))
        else:
            raise ValueError(
                f"{play}: expected an episode to yield Ask, Run or Call, found {step!r}"
            )

    def _fail(self, play: _Play, error: Exception) -> None:
        self.failed[play.task] = self.failed.get(play.task, 0) + 1
        self._end(play, 0.0, "failed", self._note(play, error))

    def _end(self, play: _Play, score: float, ended: Ended, error: str = "") -> None:
        self._live[play][play.candidate, play.index, play.repeat] = score
        if ended != "scored":
            self._close(play)
        del self._live[play]
        self._ended += 1
        if self._conversation is not None:
            self._conversation.end(play)
        if self._on_episode is not None:
            self._on_episode(
                Transcript(
                    play.task,
                    play.index,
                    play.name,
                    play.repeat,
                    score,
                    ended,
                    error,
                    tuple(play.steps),
                )
            )

    def _close(self, play: _Play) -> None:
        try:
            play.episode.close()
        except Exception as error:
            self._note(play, error)

    def _note(self, play: _Play, error: Exception) -> str:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        text = f"{play}: {type(error).__name__}: {error}{where}"
        if len(self.errors) < ERRORS_KEPT:
            self.errors.append(text)
        return text


def _checked(play: _Play, value: Any) -> float:
    try:
        score = float(np.float32(value))
    except (TypeError, ValueError):
        score = math.nan
    if not 0.0 <= score <= 1.0:
        raise ValueError(f"{play}: expected a score in [0, 1], found {value!r}")
    return score
