"""Presets: every choice that makes one CycleQD, by name.

`PAPER` is the algorithm as it is written (Kuroki et al., ICLR 2025, arXiv 2410.14735), `REFERENCE`
what the authors' published code computes. A preset is data; it is turned into the parts of the
loop before anything is compiled, and each part can be had alone. Change one choice with
``dataclasses.replace``.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from qdax.core.emitters.repertoire_selectors.selector import Selector

from cycleqd_jax.merging.child_svd import child_svd_mutation
from cycleqd_jax.merging.crossover import Crossover, draw_weights, linear_crossover
from cycleqd_jax.merging.expert_svd import expert_svd_mutation
from cycleqd_jax.merging.mutation import Mutation, gaussian_mutation, no_mutation
from cycleqd_jax.merging.singular_values import singular_value_mutation
from cycleqd_jax.merging.slerp import draw_place, slerp_crossover
from cycleqd_jax.merging.space import Space
from cycleqd_jax.qd.emitter import CycleQDEmitter
from cycleqd_jax.qd.grid import Grid, grid_from_experts, make_grid
from cycleqd_jax.qd.schedule import Schedule, cycle_per_child, cycle_per_generation
from cycleqd_jax.qd.selection import EliteSelector, Formula, RandomSelector

CrossoverKind = Literal["linear", "slerp"]
MutationKind = Literal["child_svd", "expert_svd", "singular_values", "gaussian", "none"]
SelectionKind = Literal["elite", "random"]
ScheduleKind = Literal["generation", "child"]

KINDS = {
    "crossover": get_args(CrossoverKind),
    "mutation": get_args(MutationKind),
    "selection": get_args(SelectionKind),
    "formula": get_args(Formula),
    "schedule": get_args(ScheduleKind),
}
"""Field of a preset -> what it may be."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """Choices of a CycleQD run; the defaults are the paper's.

    What a kind does not use is ignored.

    Attributes:
        crossover: "linear" or "slerp".
        crossover_mean: linear: mean of a parent's weight.
        crossover_std: linear: its standard deviation. The paper leaves both numbers open; the
            authors' code draws from ``torch.normal(1, 0.01)``, whose second argument is the
            standard deviation, and so do both presets.
        slerp_low: slerp: lower end of the place on the arc.
        slerp_high: slerp: upper end.
        mutation: "child_svd", "expert_svd", "singular_values", "gaussian" or "none".
        mutation_strength: ``w_max`` of the two SVD mutations, sigma of the other two.
        mutation_rank: singular_values: how many are perturbed.
        selection: "elite" or "random".
        formula: elite: "paper" or "reference", see `EliteSelector`.
        alpha_low: elite: factor of the weakest.
        alpha_high: elite: factor of the best, or the range added by "reference".
        bins: cells per behaviour characteristic.
        ranges: ``(lower, upper)`` of the grid for every task, or None to take it from the experts.
        grid_low: without ranges: the grid begins at this share of the weakest expert's score.
        grid_high: without ranges: it ends at this share of the best expert's score.
        schedule: the archive changes every "generation" or every "child".
        temperature: of the softmax that mixes the best elites, see `aggregation.aggregate`.

    Raises:
        ValueError: an unknown kind; numbers are checked by the parts they are given to.
    """

    crossover: CrossoverKind = "linear"
    crossover_mean: float = 1.0
    crossover_std: float = 0.01
    slerp_low: float = 0.0
    slerp_high: float = 1.0
    mutation: MutationKind = "child_svd"
    mutation_strength: float = 2.0
    mutation_rank: int = 256
    selection: SelectionKind = "elite"
    formula: Formula = "paper"
    alpha_low: float = 0.5
    alpha_high: float = 0.8
    bins: int = 15
    ranges: tuple[tuple[float, float], ...] | None = None
    grid_low: float = 0.85
    grid_high: float = 1.15
    schedule: ScheduleKind = "generation"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for field, kinds in KINDS.items():
            if getattr(self, field) not in kinds:
                raise ValueError(
                    f"{field}: expected one of {', '.join(kinds)}, found {getattr(self, field)!r}"
                )

    def build_crossover(self, model: Any, space: Space = "spectral") -> Crossover:
        """Crossover of this preset; arguments as of `build_emitter`."""
        if self.crossover == "linear":
            return linear_crossover(self.crossover_mean, self.crossover_std)
        return slerp_crossover(model, self.slerp_low, self.slerp_high, space)

    def crossover_draw(self, key: jax.Array) -> dict[str, jax.Array]:
        """What the crossover draws from its key: ``weights`` (2,), or ``place`` on the arc ()."""
        if self.crossover == "linear":
            return {"weights": draw_weights(self.crossover_mean, self.crossover_std, key)}
        return {"place": draw_place(self.slerp_low, self.slerp_high, key)}

    def build_mutation(
        self, model: Any, space: Space = "spectral", base: Any | None = None
    ) -> Mutation:
        """Mutation of this preset; arguments as of `build_emitter`."""
        strength = self.mutation_strength
        if self.mutation == "child_svd":
            return child_svd_mutation(model, strength, space)
        if self.mutation == "expert_svd":
            return expert_svd_mutation(model, strength, space)
        if self.mutation == "singular_values":
            weights = base if space == "dense" else None
            return singular_value_mutation(model, strength, self.mutation_rank, space, weights)
        return gaussian_mutation(strength) if self.mutation == "gaussian" else no_mutation()

    def build_selector(self) -> Selector:
        """Selector of this preset."""
        if self.selection == "random":
            return RandomSelector()
        return EliteSelector(self.alpha_low, self.alpha_high, self.formula)

    def build_schedule(self) -> Schedule:
        """Schedule of this preset."""
        return cycle_per_child if self.schedule == "child" else cycle_per_generation

    def build_grid(self, expert_scores: Any) -> Grid:
        """Grid of this preset.

        Args:
            expert_scores: (E, K) score of every expert on every task.

        Raises:
            ValueError: not one range a task, or what `make_grid` and `grid_from_experts` refuse.
        """
        if self.ranges is None:
            return grid_from_experts(expert_scores, self.bins, self.grid_low, self.grid_high)
        if np.ndim(expert_scores) != 2 or np.shape(expert_scores)[1] != len(self.ranges):
            raise ValueError(
                f"expected expert scores of shape (experts, {len(self.ranges)}), one column for "
                f"each of the preset's ranges, found {np.shape(expert_scores)}: give the preset "
                "the ranges of your tasks, or ranges=None to take them from the experts"
            )
        lower, upper = zip(*self.ranges, strict=True)
        return make_grid(lower, upper, self.bins)

    def build_emitter(
        self,
        model: Any,
        batch_size: int,
        num_archives: int,
        *,
        space: Space = "spectral",
        base: Any | None = None,
        expert_of_archive: Sequence[int] | None = None,
    ) -> CycleQDEmitter:
        """Emitter with all parts of this preset.

        Args:
            model: the experts' spectral basis, in either space; operators that need less of it
                also take its ``GainLayout`` or, in the dense space, the tree of roles.
            batch_size: children a generation.
            num_archives: K.
            space: what a genotype is.
            base: weights of the base, for "singular_values" in the dense space.
            expert_of_archive: see `CycleQDEmitter`.

        Raises:
            ValueError: what the parts refuse.
        """
        return CycleQDEmitter(
            self.build_selector(),
            self.build_crossover(model, space),
            self.build_mutation(model, space, base),
            batch_size,
            num_archives,
            schedule=self.build_schedule(),
            expert_of_archive=expert_of_archive,
        )


PAPER = Preset()
"""The paper's algorithm. It leaves open the weights of crossover (taken from the authors' code) and
``w_max`` (2, so that a child keeps its size on average)."""

REFERENCE = Preset(
    mutation="expert_svd",
    mutation_strength=0.1,
    formula="reference",
    ranges=((0.0, 0.45), (0.0, 0.75), (0.0, 0.45)),
    schedule="child",
)
"""The authors' code with elite sampling and SVD mutation (its default configuration has neither).

The ranges are theirs for operating system, coding and database; give your own for other tasks.
Where their code differs beyond this preset: it sends one child at a time to each worker and begins
with the second archive, ours with the first; it draws and merges in bfloat16, ours in float32; with
fewer than two elites in an archive it never returns, ours breeds an elite with itself. The final
model is not in their code; `temperature` is the paper's.
"""

DEFAULT = Preset(crossover_std=0.1, mutation="expert_svd", mutation_strength=0.1)
"""What a run does unless told otherwise: the paper's selection, grid and schedule with the
authors' mutation, which is exact in the spectral space, and weights that move the children."""

PRESETS = {"default": DEFAULT, "paper": PAPER, "reference": REFERENCE}
"""Name -> preset."""
