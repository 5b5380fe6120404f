"""CMA-ES control: every archive learns which crossover and mutation parameters suit it.

In archive k a CMA-ES searches a matrix ``M``. The parameters of a child are a linear map of its
parents' cells, squashed to their ranges,

    p = squash(x M),    x = (cell of the first parent, cell of the second parent, 1),

where a cell is its centre's K - 1 coordinates, scaled to [0, 1] by the tasks' ranges. This is the
optional mode of the authors' code of CycleQD (Kuroki et al., ICLR 2025, arXiv 2410.14735) with
three differences. The map has a constant, so that a parameter need not depend on the cells.
Parameters are squashed to documented ranges; the authors add raw outputs to the defaults. And a
candidate ``M`` is ranked by what its children brought to the archives, as in CMA-ME's improvement
emitter (Fontaine et al., GECCO 2020); the authors rank by the scores of the child itself.

`cycleqd_jax.qd.adaptation` says how candidates are ranked and when the search begins anew.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int
from qdax.core.emitters.repertoire_selectors.selector import Selector

from cycleqd_jax.qd.adaptation import ControlSettings, ControlState, begin, learn, turns
from cycleqd_jax.qd.emitter import CycleQDEmitter
from cycleqd_jax.qd.parametric import Parameter, Parametric, squash
from cycleqd_jax.qd.schedule import Schedule, cycle_per_generation
from cycleqd_jax.qd.tessellation import Tessellation, bounds


def parent_features(
    tessellation: Tessellation,
    scores: Float[Array, "batch parents tasks"],
    archive: Int[Array, " batch"],
) -> Float[Array, "batch features"]:
    """Inputs ``x`` of the map: the parents' cells in [0, 1] and a constant 1.

    Args:
        tessellation: the cells.
        scores: (B, 2, K) scores of both parents.
        archive: (B,) archive each child is bred in.

    Returns:
        (B, 2 (K - 1) + 1).
    """
    batch, parents, tasks = scores.shape

    def centres(k: jax.Array) -> jax.Array:
        lower, upper = bounds(tessellation.lower, tessellation.upper, k)
        span = jnp.where(upper > lower, upper - lower, 1.0)
        return (tessellation.centroids(k) - lower) / span

    tables = jax.vmap(centres)(jnp.arange(tasks, dtype=jnp.int32))
    cell = jax.vmap(tessellation.cell_of)(scores, archive)
    found = tables[archive[:, None], cell].reshape(batch, parents * (tasks - 1))
    return jnp.concatenate([found, jnp.ones((batch, 1), jnp.float32)], axis=1)


def choose_values(
    repertoire: Any,
    state: ControlState,
    parents: Int[Array, "batch 2"],
    archive: Int[Array, " batch"],
    crossover: Parametric,
    mutation: Parametric,
) -> Float[Array, "batch parameters"]:
    """Values of the operators' parameters that the archives' candidates choose.

    Args:
        repertoire: archives with cells, where the parents are.
        state: of the search, whose candidates take turns.
        parents: (B, 2) pool indices.
        archive: (B,) archive each child is bred in.
        crossover: its parameters come first.
        mutation: its parameters come last.
    """
    features = parent_features(repertoire.tessellation, repertoire.scores[parents], archive)
    maps = state.candidates[archive, turns(state.children, archive)]
    outputs = jnp.einsum(
        "bf,bfp->bp",
        features,
        maps.reshape(*features.shape, -1),
        precision=jax.lax.Precision.HIGHEST,
    )
    return squash(outputs, crossover.parameters + mutation.parameters)


class ControlledEmitter(CycleQDEmitter):
    """QDax emitter of CycleQD whose operators' parameters each archive learns by CMA-ES."""

    _choose_values = staticmethod(choose_values)

    def __init__(
        self,
        selector: Selector,
        crossover: Parametric,
        mutation: Parametric,
        batch_size: int,
        num_archives: int,
        *,
        schedule: Schedule = cycle_per_generation,
        expert_of_archive: Sequence[int] | None = None,
        sharding: Sharding | None = None,
        settings: ControlSettings | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            selector: draws two parents from one archive; any QDax selector, hashable.
            crossover: `parametric_crossover`, or your own made `parametric`.
            mutation: `parametric_mutation`, or your own made `parametric`.
            batch_size: children a generation.
            num_archives: K, the repertoire's number of archives.
            schedule: which archive each child is bred in.
            expert_of_archive: expert whose directions serve archive k; default: expert k.
            sharding: as for `CycleQDEmitter`.
            settings: settings of the CMA-ES; default: ``ControlSettings()``.

        Raises:
            ValueError: as `CycleQDEmitter`, or an operator without parameters' ranges.
        """
        for name, operator in (("crossover", crossover), ("mutation", mutation)):
            if not isinstance(operator, Parametric):
                raise ValueError(
                    f"{name}: expected a Parametric operator (see parametric, with no parameters "
                    f"if none is to be controlled), found {type(operator).__name__}"
                )
        if not crossover.parameters + mutation.parameters:
            raise ValueError("expected at least one parameter to control, found none")
        super().__init__(
            selector,
            crossover,
            mutation,
            batch_size,
            num_archives,
            schedule=schedule,
            expert_of_archive=expert_of_archive,
            sharding=sharding,
        )
        self._settings = settings or ControlSettings()
        self._parameters = crossover.parameters + mutation.parameters

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """What is controlled, in the order of ``info["parameters"]``."""
        return self._parameters

    def init(  # QDax's signature
        self,
        key: jax.Array,
        repertoire: Any,
        genotypes: Any,
        fitnesses: Any,
        descriptors: Any,
        extra_scores: Any,
    ) -> ControlState:
        """State at generation 0.

        Raises:
            ValueError: another number of archives, or archives without cells.
        """
        if not hasattr(repertoire, "tessellation"):
            raise ValueError(
                "control needs archives with cells (a CyclicRepertoire), found "
                f"{type(repertoire).__name__}: use CycleQDEmitter there"
            )
        super().init(key, repertoire, genotypes, fitnesses, descriptors, extra_scores)
        features = 2 * (repertoire.num_archives - 1) + 1
        size = features * len(self._parameters)
        return begin(self._settings, size, key, repertoire.scores, repertoire.cells)

    def state_update(  # QDax's signature
        self,
        emitter_state: Any,
        repertoire: Any = None,
        genotypes: Any = None,
        fitnesses: Any = None,
        descriptors: Any = None,
        extra_scores: Any = None,
    ) -> ControlState:
        """Learn from the batch's scores (B, K); see `learn`."""
        return learn(
            emitter_state,
            repertoire.tessellation,
            repertoire.scores,
            repertoire.cells,
            jnp.asarray(fitnesses, jnp.float32),
            schedule=self._schedule,
            settings=self._settings,
        )
