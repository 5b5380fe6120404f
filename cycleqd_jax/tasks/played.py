"""How a population did, and how parts of it become the whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ERRORS_KEPT = 5


@dataclass(frozen=True)
class Rollout:
    """How a population did.

    An episode over a time limit and one that raised an error score 0: if they were left out,
    models that bring their judge to fall would gain by it.

    Attributes:
        attempts: task name → (candidates, problems, repeats) float32, the score of every episode;
            NaN where none was played.
        seconds: time spent in the "model", and waiting for the "sandbox" and other services. Where
            both are waited for at once it is the model's.
        requests: messages the model was asked for.
        late: task name → episodes over a time limit.
        failed: task name → episodes that raised an error.
        errors: the first of those errors, with task and problem.
        solved: task name → (candidates, problems) float32, the means over the repeats.
        scores: (candidates, tasks) float32, the means of those, in the order of the tasks; NaN
            where not all problems were played.
        standard_errors: (candidates, tasks) float32, of the scores as means over repeats of these
            problems; NaN with one repeat. How much other problems would change is not in it.
    """

    attempts: Mapping[str, np.ndarray]
    seconds: Mapping[str, float]
    requests: int
    late: Mapping[str, int]
    failed: Mapping[str, int]
    errors: tuple[str, ...] = ()
    solved: Mapping[str, np.ndarray] = field(init=False)
    scores: np.ndarray = field(init=False)
    standard_errors: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        solved = {name: scores.mean(axis=2) for name, scores in self.attempts.items()}
        means = [scores.mean(axis=1) for scores in solved.values()]
        noise = [_standard_error(scores) for scores in self.attempts.values()]
        object.__setattr__(self, "solved", solved)
        object.__setattr__(self, "scores", np.stack(means, axis=1).astype(np.float32))
        object.__setattr__(self, "standard_errors", np.stack(noise, axis=1).astype(np.float32))

    @property
    def unplayable(self) -> list[str]:
        """The tasks of which no episode came to its end: their scores say nothing of the models."""
        return [
            name
            for name, scores in self.attempts.items()
            if 0 < np.isfinite(scores).sum() == self.late[name] + self.failed[name]
        ]


def beside(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts of different candidates on the same problems, one below the other."""
    return _join(parts, np.concatenate)


def together(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts of the same candidates on the same problems, each of other episodes.

    Raises:
        ValueError: an episode is in two of them.
    """

    def overlay(scores: Sequence[np.ndarray]) -> np.ndarray:
        whole = np.full_like(scores[0], np.nan)
        for part in scores:
            played = ~np.isnan(part)
            if (played & ~np.isnan(whole)).any():
                raise ValueError("expected every episode in one rollout, found one in two")
            whole[played] = part[played]
        return whole

    return _join(parts, overlay)


def _join(parts: Sequence[Rollout], join: Callable[[Sequence[np.ndarray]], np.ndarray]) -> Rollout:
    def total(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {name: sum(count[name] for count in counts) for name in counts[0]}

    names = parts[0].attempts
    return Rollout(
        attempts={name: join([part.attempts[name] for part in parts]) for name in names},
        seconds=total([part.seconds for part in parts]),
        requests=sum(part.requests for part in parts),
        late=total([part.late for part in parts]),
        failed=total([part.failed for part in parts]),
        errors=tuple(error for part in parts for error in part.errors)[:ERRORS_KEPT],
    )


def _standard_error(scores: np.ndarray) -> np.ndarray:
    """Of the means over (candidates, problems, repeats), the problems being given: (candidates,).

    Every problem's mean has the variance of its repeats over their number.
    """
    candidates, problems, repeats = scores.shape
    if repeats < 2:
        return np.full(candidates, np.nan)
    variance = scores.astype(np.float64).var(axis=2, ddof=1) / repeats
    return np.sqrt(variance.sum(axis=1)) / problems
