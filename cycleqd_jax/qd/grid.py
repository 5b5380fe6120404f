"""The grid of behaviour characteristics: equal bins per task.

Bins are half open, ``(lo, hi]``, and scores outside the range belong to the end bins (Kuroki et
al., arXiv 2410.14735). An archive has ``bins ** (K - 1)`` cells: for many tasks see
`cycleqd_jax.qd.cvt` and `cycleqd_jax.qd.dns`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from cycleqd_jax.qd.tessellation import bounds, expert_ranges, other_tasks, task_ranges


class Grid(struct.PyTreeNode):
    """Equal bins per task, a `Tessellation`. Make one with `make_grid` or `grid_from_experts`.

    Attributes:
        lower: (K,) float32, lower end of each task's range.
        upper: (K,) float32, upper end.
        edges: (K, bins - 1) float32, the inner edges. Stored, not recomputed, so that a score
            that lies on an edge falls on the same side in every compiled function.
        bins: bins per task, static.
    """

    lower: Any
    upper: Any
    edges: Any
    bins: int = struct.field(pytree_node=False)

    @property
    def num_tasks(self) -> int:
        """Number of tasks K."""
        return int(self.lower.shape[0])

    @property
    def num_cells(self) -> int:
        """Cells of one archive, ``bins ** (K - 1)``."""
        return int(self.bins ** (self.num_tasks - 1))

    def bounds(self, k: int | Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
        """Ranges of archive k's behaviour characteristics: lower (K-1,) and upper (K-1,)."""
        return bounds(self.lower, self.upper, k)

    def cell_of(
        self, scores: Float[Array, "batch tasks"], k: int | Int[Array, ""]
    ) -> Int[Array, " batch"]:
        """Cell of every row in archive k (may be traced), row-major over the other tasks."""
        bins = jnp.take(bins_of(self, scores), other_tasks(self.num_tasks, k), axis=1)
        powers = [self.bins**i for i in reversed(range(self.num_tasks - 1))]
        return jnp.sum(bins * jnp.asarray(powers, jnp.int32), axis=1, dtype=jnp.int32)

    def centroids(self, k: int | Int[Array, ""]) -> Float[Array, "cells others"]:
        """Centres of archive k's cells, in the order of `cell_of`."""
        lower, upper = self.bounds(k)
        others = self.num_tasks - 1
        axes = np.meshgrid(*[np.arange(self.bins)] * others, indexing="ij")
        middle = (np.stack([a.ravel() for a in axes], axis=-1) + 0.5) / self.bins
        return lower + (upper - lower) * jnp.asarray(middle, jnp.float32)


def make_grid(lower: Any, upper: Any, bins: int) -> Grid:
    """Grid with ``bins`` equal bins per task between ``lower`` and ``upper``.

    ``lower == upper`` is legal: scores up to it fall into the first bin, scores above it into the
    last.

    Args:
        lower: (K,) concrete numbers, K >= 2.
        upper: (K,) not below ``lower``.
        bins: at least 1.

    Raises:
        ValueError: fewer than two tasks, shapes that differ, ends out of order or not finite,
            fewer than one bin, or more cells than an int32 can count.
    """
    low, high = task_ranges(lower, upper, "grid")
    if bins < 1:
        raise ValueError(f"a grid needs at least 1 bin per task, found {bins}")
    if bins ** (low.size - 1) > np.iinfo(np.int32).max:
        raise ValueError(
            f"{bins} bins for {low.size} tasks make {bins ** (low.size - 1)} cells an archive, "
            "more than 2147483647: use fewer bins, or make_cvt, or DominatedNoveltyRepertoire"
        )
    steps = np.arange(1, bins, dtype=np.float64) / bins
    span = high.astype(np.float64) - low.astype(np.float64)
    edges = low.astype(np.float64)[:, None] + span[:, None] * steps
    return Grid(
        lower=jnp.asarray(low),
        upper=jnp.asarray(high),
        edges=jnp.asarray(edges, jnp.float32),
        bins=bins,
    )


def grid_from_experts(scores: Any, bins: int = 15, low: float = 0.85, high: float = 1.15) -> Grid:
    """Grid over the experts' scores; see `cycleqd_jax.qd.tessellation.expert_ranges`.

    Args:
        scores: (E, K) score of every expert on every task, at least one expert, finite.
        bins: bins per task.
        low: share of the weakest expert's score at which the range begins.
        high: share of the best expert's score at which it ends.

    Raises:
        ValueError: wrong shape or not finite, or what `make_grid` refuses.
    """
    return make_grid(*expert_ranges(scores, low, high), bins)


def bins_of(grid: Grid, scores: Float[Array, "batch tasks"]) -> Int[Array, "batch tasks"]:
    """Bin of every score on its task, in ``0 .. bins - 1``; NaN falls into bin 0."""
    below = grid.edges < scores.astype(jnp.float32)[:, :, None]
    return jnp.sum(below, axis=-1, dtype=jnp.int32)
