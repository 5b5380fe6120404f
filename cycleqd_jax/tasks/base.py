"""What a task is: problems, and an episode per problem written as a generator.

An episode yields :class:`Ask` when it wants the model to speak, :class:`Run` when it wants a
program executed in the sandbox and :class:`Call` when it waits for a service of its own; it is sent
the answer and finally returns a score in [0, 1]. It never learns which model speaks, and it never
waits for anything itself, so the rollout can keep the episodes of every candidate and task in one
batch. An episode may be closed at any ``yield``: what it opened it closes in a ``finally``, without
yielding there. An error that it raises costs it its score; `ServiceGone` ends the run.
"""

import hashlib
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from cycleqd_jax.sandbox.base import Job

# "search" scores children, "validation" chooses among finished models, "test" is met once, at the
# end. Public benchmarks have no "train".
Split = Literal["train", "search", "validation", "test"]

# Six, two, one and one problem of every ten; a problem's solution decides where it belongs.
_SPLIT_OF_DIGIT: tuple[Split, ...] = (
    *("train",) * 6,
    *("search",) * 2,
    "validation",
    "test",
)


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


class Request(NamedTuple):
    """What a policy is asked: the next message of this conversation, spoken by ``candidate``.

    Attributes:
        candidate: who speaks.
        messages: the conversation so far.
        seed: in [0, 2^31), of this turn of this attempt: a policy that draws its words draws them
            with it, so that repeats differ and a run can be repeated.
    """

    candidate: int
    messages: tuple[Message, ...]
    seed: int = 0


@runtime_checkable
class Policy(Protocol):
    """A model, or anything that speaks: messages in, text out."""

    def __call__(self, requests: Sequence[Request]) -> list[str]:
        """Answer every request, in order."""


class Conversation(Protocol):
    """What a `Speaker` opens; episodes are named by the caller."""

    def ask(self, who: Sequence[Any], requests: Sequence[Request]) -> None:
        """Ask for the next messages; returns at once."""

    def texts(self, heard: Sequence[Any]) -> list[str]:
        """The messages that were heard, as text."""

    def end(self, who: Any) -> None:
        """An episode will ask for nothing more."""

    def close(self) -> None:
        """Nothing is heard any more."""


@runtime_checkable
class Speaker(Protocol):
    """A policy that answers each request as soon as it can, and takes up what it said before."""

    def converse(
        self, heard: Callable[[Any, Any], None], failed: Callable[[Exception], None]
    ) -> Conversation:
        """Begin to speak.

        Args:
            heard: is given an episode and a form of its message that only `Conversation.texts` can
                read, from any thread.
            failed: is given what makes further messages impossible.
        """


class ServiceGone(ConnectionError):  # noqa: N818 (a state of the service, not a bug)
    """A service that all episodes of a task need is lost: no problem's fault, so the run ends."""


@dataclass(frozen=True)
class Ask:
    """The episode wants the model's next message."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Run:
    """The episode wants a program run in the sandbox."""

    job: Job


@dataclass(frozen=True)
class Call:
    """The episode wants a function called that may wait, for a database server for instance.

    Attributes:
        function: called in a thread; its result is the answer, its error is raised in the episode.
        seconds: after this time, counted from when a thread takes it up, the episode meets a
            TimeoutError. The thread cannot be ended: the function has to return by itself, soon
            after.
    """

    function: Callable[[], Any]
    seconds: float


# Sent: a text for Ask, an Outcome for Run, the function's result for Call.
Episode = Generator[Ask | Run | Call, Any, float]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A generated problem; subclasses add what judging it needs.

    Attributes:
        prompt: the user's message. It identifies the problem: equal prompts are equal problems.
        answers: what an ideal agent says, turn by turn.
        solution: what solves it, whatever the wording: problems of one solution share a split.
        observations: what the environment answers between those turns (one fewer than answers).
        document: the same content as plain text that is no conversation, for pretraining.
        kind: which of the task's question families it belongs to, for reports.
    """

    prompt: str
    answers: tuple[str, ...]
    solution: str
    observations: tuple[str, ...] = ()
    document: str
    kind: str

    @property
    def demonstration(self) -> tuple[Message, ...]:
        """The whole ideal conversation, for fine-tuning."""
        turns = [Message("user", self.prompt)]
        for answer, observation in zip(self.answers, (*self.observations, None), strict=True):
            turns.append(Message("assistant", answer))
            if observation is not None:
                turns.append(Message("user", observation))
        return tuple(turns)

    def ideal_answer(self, turn: int, heard: str) -> str:
        """What an ideal agent says, having ``heard`` the message before; "" when it is done.

        Problems whose answer is known only once the environment has spoken override this.
        """
        return self.answers[turn] if turn < len(self.answers) else ""


P = TypeVar("P", bound=Problem)


@runtime_checkable
class Task(Protocol):
    """A skill: where its problems come from and how an attempt is judged."""

    @property
    def name(self) -> str:
        """The name scores are reported under."""

    def problems(
        self, split: Split, count: int, *, seed: int = 0, difficulty: int = 1
    ) -> Sequence[Problem]:
        """Draw ``count`` distinct problems of one split."""

    def episode(self, problem: Problem) -> Episode:
        """Start an attempt at one problem."""


def split_of(solution: str) -> Split:
    """Return the split of a problem: a function of its solution alone.

    So splits are disjoint in what has to be found out: another wording, or another name for the
    function, never brings a training problem back as a test.
    """
    digest = hashlib.blake2b(solution.encode(), digest_size=8).digest()
    return _SPLIT_OF_DIGIT[int.from_bytes(digest) % len(_SPLIT_OF_DIGIT)]


def draw_problems(
    make: Callable[[random.Random, int], P], split: Split, count: int, seed: int, difficulty: int
) -> list[P]:
    """Draw distinct problems of one split from a generator of problems.

    Args:
        make: draws one problem from a random source at a difficulty.
        split: which split to keep.
        count: how many distinct problems.
        seed: the same seed gives the same problems.
        difficulty: passed to ``make``.

    Raises:
        ValueError: the generator knows fewer than ``count`` problems of this split, or there is no
            such split.
    """
    if split not in _SPLIT_OF_DIGIT:
        known = ", ".join(dict.fromkeys(_SPLIT_OF_DIGIT))
        raise ValueError(f"split: expected one of {known}, found {split!r}")
    rng = random.Random(f"{split}/{seed}/{difficulty}")
    found: dict[str, P] = {}
    misses = 0
    while len(found) < count:
        problem = make(rng, difficulty)
        if problem.prompt in found or split_of(problem.solution) != split:
            misses += 1
            if misses > 1000 + 50 * count:
                raise ValueError(
                    f"expected {count} distinct problems for split {split!r} at difficulty "
                    f"{difficulty}, found only {len(found)}: ask for fewer or raise the difficulty"
                )
            continue
        found[problem.prompt] = problem
    return list(found.values())
