"""The grid of behaviour characteristics: which cell of which archive a row of scores falls into.

In archive k the score on task k is the quality and the other K - 1 scores choose the cell. Bins
are half open, ``(lo, hi]``, and scores outside the range belong to the end bins (Kuroki et al.,
arXiv 2410.14735).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int


class Grid(struct.PyTreeNode):
    """Equal bins per task. Make one with `make_grid` or `grid_from_experts`.

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
        others = other_tasks(self.num_tasks, k)
        return jnp.take(self.lower, others), jnp.take(self.upper, others)


def _as_range(values: Any, name: str) -> np.ndarray:
    array = np.asarray(values, np.float32)
    if array.ndim != 1 or array.size < 2:
        raise ValueError(
            f"grid {name} must hold one number for each of at least 2 tasks (with one task no "
            f"behaviour tells cells apart), found shape {array.shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"grid {name} must be finite, found {array.tolist()}")
    return array


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
    low, high = _as_range(lower, "lower"), _as_range(upper, "upper")
    if low.shape != high.shape:
        raise ValueError(
            f"grid lower and upper must have one shape, found {low.shape} and {high.shape}"
        )
    if bins < 1:
        raise ValueError(f"a grid needs at least 1 bin per task, found {bins}")
    if (low > high).any():
        task = int(np.argmax(low > high))
        raise ValueError(
            f"grid of task {task}: expected lower <= upper, found {low[task]} > {high[task]}"
        )
    if bins ** (low.size - 1) > np.iinfo(np.int32).max:
        raise ValueError(
            f"{bins} bins for {low.size} tasks make {bins ** (low.size - 1)} cells an archive, "
            "more than 2147483647: use fewer bins"
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
    """Grid from the experts' scores: per task from 85% of the weakest to 115% of the best expert.

    Args:
        scores: (E, K) score of every expert on every task, at least one expert, finite.
        bins: bins per task.
        low: share of the weakest expert's score at which the range begins.
        high: share of the best expert's score at which it ends.

    Raises:
        ValueError: wrong shape or not finite, or what `make_grid` refuses.
    """
    table = np.asarray(scores, np.float32)
    if table.ndim != 2 or table.shape[0] < 1:
        raise ValueError(f"expected expert scores of shape (experts, tasks), found {table.shape}")
    weakest, best = table.min(axis=0), table.max(axis=0)
    # A share of a negative score moves the end inwards, so it is taken the other way round.
    lower = np.where(weakest >= 0, low * weakest, weakest / low if low else weakest)
    upper = np.where(best >= 0, high * best, best / high if high else best)
    return make_grid(lower, upper, bins)


def other_tasks(num_tasks: int, k: int | Int[Array, ""]) -> Int[Array, " others"]:
    """Tasks that choose the cell in archive k, in task order: shape (K-1,); ``k`` may be traced."""
    position = jnp.arange(num_tasks - 1, dtype=jnp.int32)
    return position + (position >= k).astype(jnp.int32)


def bins_of(grid: Grid, scores: Float[Array, "batch tasks"]) -> Int[Array, "batch tasks"]:
    """Bin of every score on its task, in ``0 .. bins - 1``; NaN falls into bin 0."""
    below = grid.edges < scores.astype(jnp.float32)[:, :, None]
    return jnp.sum(below, axis=-1, dtype=jnp.int32)


def cell_of(
    grid: Grid, scores: Float[Array, "batch tasks"], k: int | Int[Array, ""]
) -> Int[Array, " batch"]:
    """Cell of every row in archive k (may be traced), row-major over the other tasks in order."""
    bins = jnp.take(bins_of(grid, scores), other_tasks(grid.num_tasks, k), axis=1)
    powers = [grid.bins**i for i in reversed(range(grid.num_tasks - 1))]
    return jnp.sum(bins * jnp.asarray(powers, jnp.int32), axis=1, dtype=jnp.int32)


def centroids(grid: Grid, k: int | Int[Array, ""]) -> Float[Array, "cells others"]:
    """Centres of archive k's cells, in the order of `cell_of`."""
    lower, upper = grid.bounds(k)
    others = grid.num_tasks - 1
    axes = np.meshgrid(*[np.arange(grid.bins)] * others, indexing="ij")
    middle = (np.stack([a.ravel() for a in axes], axis=-1) + 0.5) / grid.bins
    return lower + (upper - lower) * jnp.asarray(middle, jnp.float32)
