"""Everything that decides the outcome of a run, in one frozen dataclass."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunConfig:
    """One CycleQD run: a run is a pure function of this config and of the models it names.

    Attributes:
        base: folder of the base model.
        experts: expert name → folder, at least two.
        tasks: task names, one archive each.
        seed: of everything random in the run.
        generations: how many batches of children are bred.
        children: children a generation, evaluated together.
        problems: problems of the ``search`` split a child is scored on, per task.
        final_problems: problems of the ``search`` split the finalists are scored on, per task.
        finalists: elites that compete to be ``cycleqd/best``.
        test_problems: problems of the ``test`` split for the final table, per task.
        difficulty: of all problems.
        rank: directions kept per matrix and expert; None keeps every one above rounding noise.
        bins: grid bins per task.
        grid_low: the grid begins at this share of the weakest expert's score.
        grid_high: the grid ends at this multiple of the best expert's score.
        crossover_mean: mean of the parents' mixing weights.
        crossover_std: their standard deviation.
        mutation_max: expert-SVD mutation adds U[0, mutation_max] to the gains of one expert.
        alpha_low: elite sampling's weight at the bottom of an archive's range.
        alpha_high: and at its top.
        temperature: of the softmax that mixes the archives' best elites.
        uniform_scales: the λ that are tried for the uniform merge.
        max_new_tokens: the longest answer.
        checkpoint_every: generations between two checkpoints.
        sandbox: ``auto``, ``bubblewrap`` or ``unshare``.

    Raises:
        ValueError: a number out of range, or fewer than two experts.
    """

    base: str
    experts: Mapping[str, str]
    tasks: tuple[str, ...]
    seed: int = 0
    generations: int = 60
    children: int = 16
    problems: int = 32
    final_problems: int = 64
    finalists: int = 16
    test_problems: int = 200
    difficulty: int = 1
    rank: int | None = None
    bins: int = 15
    grid_low: float = 0.85
    grid_high: float = 1.15
    crossover_mean: float = 1.0
    crossover_std: float = 0.1
    mutation_max: float = 0.1
    alpha_low: float = 0.5
    alpha_high: float = 0.8
    temperature: float = 1.0
    uniform_scales: tuple[float, ...] = field(
        default=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
    )
    max_new_tokens: int = 48
    checkpoint_every: int = 10
    sandbox: str = "auto"

    def __post_init__(self) -> None:
        if len(self.experts) < 2:
            raise ValueError(
                f"expected at least two experts, found {len(self.experts)} "
                f"({', '.join(self.experts) or 'none'}): give --experts NAME=DIR NAME=DIR …"
            )
        for name in [
            "generations",
            "children",
            "problems",
            "final_problems",
            "finalists",
            "test_problems",
            "difficulty",
            "bins",
            "max_new_tokens",
            "checkpoint_every",
        ]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("crossover_std", "mutation_max"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, found {getattr(self, name)}")
        if not self.uniform_scales:
            raise ValueError("uniform_scales: expected at least one λ to try, found none")

    def to_json(self) -> dict[str, Any]:
        """The config in JSON's types, for ``config.json``."""
        return {**asdict(self), "experts": dict(self.experts)}
