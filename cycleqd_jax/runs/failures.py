"""What could not be scored: counted, shown, and no reason to stop while anything else could."""

from dataclasses import asdict, dataclass

import numpy as np

from cycleqd_jax.tasks.played import Rollout


class GenerationFailed(RuntimeError):  # noqa: N818 (a state of the tasks, not a bug)
    """Not one candidate could be scored; going on would be blind."""


@dataclass(frozen=True)
class Failures:
    """Counts of what failed.

    Attributes:
        candidates: candidates with a score that is not finite; they enter no archive.
        episodes: episodes that raised an error.
        late: episodes over a time limit.
    """

    candidates: int = 0
    episodes: int = 0
    late: int = 0

    @classmethod
    def of(cls, played: Rollout, scores: np.ndarray | None = None) -> "Failures":
        """Those of one rollout.

        Args:
            played: the rollout.
            scores: (candidates, K), where they are not those of all problems.
        """
        lost = ~np.isfinite(played.scores if scores is None else scores).all(axis=1)
        return cls(int(lost.sum()), sum(played.failed.values()), sum(played.late.values()))

    def __add__(self, other: "Failures") -> "Failures":
        return Failures(
            self.candidates + other.candidates,
            self.episodes + other.episodes,
            self.late + other.late,
        )

    def __bool__(self) -> bool:
        return any(asdict(self).values())

    def __str__(self) -> str:
        parts = (
            (self.candidates, "candidates without a score"),
            (self.episodes, "episodes failed"),
            (self.late, "over time"),
        )
        return ", ".join(f"{count} {what}" for count, what in parts if count)

    def to_json(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)

    def refuse_blindness(self, who: str, played: Rollout, scores: np.ndarray | None = None) -> None:
        """Stop where no candidate has a score; ``scores`` as of `of`.

        Raises:
            GenerationFailed: all have a score that is not finite, or a task no episode of which
                came to its end; the message says which tasks and what the first errors were.
        """
        names = list(played.solved)
        lost = ~np.isfinite(played.scores if scores is None else scores)
        unplayable = played.unplayable
        if not (lost.any(axis=1).all() or unplayable):
            return
        count = len(lost)
        said = [f"{name}: no episode came to its end" for name in unplayable]
        said += [
            f"{name}: {lost[:, k].sum()} of {count} candidates without a finite score"
            for k, name in enumerate(names)
            if lost[:, k].any() and name not in unplayable
        ]
        raise GenerationFailed(
            f"{who}: no candidate could be scored ({'; '.join(said)}). Nothing of it was logged. "
            + "".join(f"\n  {error}" for error in played.errors)
            + "Mend the task, then start the same command again: the run goes on from here"
        )
