"""What happened in an episode, as data: what was said, what the environment did, the score.

A transcript is one JSON object, a line of a JSONL file:

    {"task": "database", "problem": 3, "candidate": 0, "repeat": 0,
     "score": 1.0, "ended": "scored", "error": "", "steps": [STEP, …]}

``problem`` counts the problems of the rollout from 0, ``ended`` is "scored", "late" (over a time
limit) or "failed" (the episode raised ``error``). The steps, in their order, are

    {"step": "turn", "kept": 0, "said": [["user", "…"]], "answer": "…", "seed": 17}
    {"step": "program", "kind": "python", "source": "…", "stdin": "…", "status": "ok",
     "returncode": 0, "stdout": "…", "stderr": "…", "reason": "", "seconds": 0.01}
    {"step": "call", "result": "…", "error": "", "seconds": 0.2}

A turn's messages are the first ``kept`` of the conversation up to the turn before, its answer
included, and then what was ``said`` since. Nothing that was said is shortened; the environment's
texts keep their first and last 1000 characters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cycleqd_jax.sandbox.base import Job, Outcome
from cycleqd_jax.tasks.base import Message

Ended = Literal["scored", "late", "failed"]

_KEPT_CHARACTERS = 1000


@dataclass(frozen=True)
class Turn:
    """The model spoke.

    Attributes:
        messages: the whole conversation before.
        answer: what it said.
        seed: with which its words were drawn, if they were.
    """

    messages: tuple[Message, ...]
    answer: str
    seed: int


@dataclass(frozen=True)
class Program:
    """A program ran; see `Job` and `Outcome`. Long texts are shortened."""

    kind: str
    source: str
    stdin: str
    status: str
    returncode: int
    stdout: str
    stderr: str
    reason: str
    seconds: float = field(compare=False)

    @classmethod
    def of(cls, job: Job, outcome: Outcome) -> "Program":
        """The record of a job."""
        return cls(
            kind=job.kind,
            source=_short(job.source),
            stdin=_short(job.stdin),
            status=outcome.status,
            returncode=outcome.returncode,
            stdout=_short(outcome.stdout),
            stderr=_short(outcome.stderr),
            reason=_short(outcome.reason),
            seconds=round(outcome.seconds, 4),
        )


@dataclass(frozen=True)
class Service:
    """A call was made: its result or its error, as text that may be shortened."""

    result: str
    error: str
    seconds: float = field(compare=False)

    @classmethod
    def of(cls, result: Any, error: Exception | None, seconds: float) -> "Service":
        """The record of a call."""
        shown = "" if error is not None else result if isinstance(result, str) else repr(result)
        said = "" if error is None else f"{type(error).__name__}: {error}"
        return cls(_short(shown), _short(said), round(seconds, 4))


Step = Turn | Program | Service


@dataclass(frozen=True)
class Transcript:
    """One episode; times do not tell transcripts apart.

    Attributes:
        task: its name.
        problem: its number among the task's problems of the rollout.
        candidate: who was asked.
        repeat: which attempt at the problem.
        score: in [0, 1].
        ended: "scored", "late" or "failed"; the last two score 0.
        error: what a failed episode raised.
        steps: what happened.
    """

    task: str
    problem: int
    candidate: int
    repeat: int
    score: float
    ended: Ended
    error: str
    steps: tuple[Step, ...]

    def to_row(self) -> dict[str, Any]:
        """The transcript in JSON's types."""
        steps = []
        before: tuple[Message, ...] = ()
        for step in self.steps:
            if isinstance(step, Turn):
                kept = _common(before, step.messages)
                said = [list(message) for message in step.messages[kept:]]
                row = {"step": "turn", "kept": kept, "said": said}
                steps.append({**row, "answer": step.answer, "seed": step.seed})
                before = (*step.messages, Message("assistant", step.answer))
            else:
                kind = "program" if isinstance(step, Program) else "call"
                steps.append({"step": kind, **asdict(step)})
        return {**{name: getattr(self, name) for name in _PLAIN}, "steps": steps}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Transcript":
        """The inverse of `to_row`.

        Raises:
            ValueError: the row is no transcript; the message says what is missing or unknown.
        """
        steps: list[Step] = []
        before: tuple[Message, ...] = ()
        try:
            for found in row["steps"]:
                fields = dict(found)
                kind = fields.pop("step")
                if kind == "turn":
                    said = tuple(Message(role, text) for role, text in fields["said"])
                    turn = Turn(before[: fields["kept"]] + said, fields["answer"], fields["seed"])
                    before = (*turn.messages, Message("assistant", turn.answer))
                    steps.append(turn)
                else:
                    steps.append({"program": Program, "call": Service}[kind](**fields))
            return cls(**{name: row[name] for name in _PLAIN}, steps=tuple(steps))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"expected a transcript, found something else ({type(error).__name__}: {error})"
            ) from error


_PLAIN = ("task", "problem", "candidate", "repeat", "score", "ended", "error")


def _common(before: Sequence[Message], after: Sequence[Message]) -> int:
    """How many messages two conversations begin with alike."""
    kept = 0
    for one, other in zip(before, after, strict=False):
        if one != other:
            break
        kept += 1
    return kept


def _short(text: str) -> str:
    left_out = len(text) - 2 * _KEPT_CHARACTERS
    if left_out <= 0:
        return text
    head, tail = text[:_KEPT_CHARACTERS], text[-_KEPT_CHARACTERS:]
    return f"{head}\n… {left_out} characters left out …\n{tail}"
