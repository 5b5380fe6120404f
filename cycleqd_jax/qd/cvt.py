"""Voronoi cells: as many as you ask for, however many tasks there are.

A centroidal Voronoi tessellation spreads C centres evenly over the range of the behaviour
characteristics; a model belongs to the nearest (Vassiliades et al., arXiv 1610.05729). For K = 10
tasks a grid of 15 bins would need 15^9 cells an archive.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int
from qdax.core.containers.mapelites_repertoire import compute_cvt_centroids
from threadpoolctl import threadpool_limits

from cycleqd_jax.qd.tessellation import bounds, other_tasks, task_ranges


class CVT(struct.PyTreeNode):
    """Nearest-centre cells of every archive, a `Tessellation`. Make one with `make_cvt`.

    Distances are Euclidean in units of each task's range, so that a task scored in seconds does
    not drown one scored in shares. Scores outside the range count as its ends, as in the grid. On
    a tie the centre with the lowest index wins; NaN falls into cell 0.

    Attributes:
        lower: (K,) float32, lower end of each task's range.
        upper: (K,) float32, upper end.
        centres: (K, C, K-1) float32, centres of every archive's cells, in units of score.
    """

    lower: Any
    upper: Any
    centres: Any

    @property
    def num_tasks(self) -> int:
        """Number of tasks K."""
        return int(self.centres.shape[0])

    @property
    def num_cells(self) -> int:
        """Cells of one archive, C."""
        return int(self.centres.shape[1])

    @property
    def bins(self) -> None:
        """None: the cells are no grid."""
        return None

    def bounds(self, k: int | Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
        """Ranges of archive k's behaviour characteristics: lower (K-1,) and upper (K-1,)."""
        return bounds(self.lower, self.upper, k)

    def cell_of(
        self, scores: Float[Array, "batch tasks"], k: int | Int[Array, ""]
    ) -> Int[Array, " batch"]:
        """Index of the nearest centre of archive k (may be traced) for every row."""
        lower, upper = self.bounds(k)
        behaviour = jnp.take(scores, other_tasks(self.num_tasks, k), axis=1).astype(jnp.float32)
        behaviour = jnp.clip(behaviour, lower, upper)
        # A task whose range is a point tells no cells apart: its weight is 0, not infinite.
        width = upper - lower
        weight = jnp.where(width > 0, 1.0 / jnp.where(width > 0, width, 1.0), 0.0)
        centres = self.centroids(k)
        # Differences, not the expanded square, whose cancellation would move rows between cells;
        # one task at a time, so that nothing larger than (batch, cells) is ever stored.
        distance = jnp.zeros((scores.shape[0], self.num_cells), jnp.float32)
        for i in range(self.num_tasks - 1):
            step = (behaviour[:, i, None] - centres[None, :, i]) * weight[i]
            distance = distance + step * step
        return jnp.argmin(distance, axis=1).astype(jnp.int32)

    def centroids(self, k: int | Int[Array, ""]) -> Float[Array, "cells others"]:
        """Centres of archive k's cells, in the order of `cell_of`."""
        return jnp.take(self.centres, jnp.asarray(k, jnp.int32), axis=0)


def make_cvt(
    lower: Any, upper: Any, num_cells: int, key: jax.Array, num_samples: int = 50_000
) -> CVT:
    """Tessellate every archive into ``num_cells`` cells.

    The centres are QDax's (k-means of uniform samples of the unit cube), found once and scaled to
    every archive's ranges: a pure function of the arguments.

    Args:
        lower: (K,) concrete numbers, K >= 2; see `cycleqd_jax.qd.tessellation.expert_ranges`.
        upper: (K,) not below ``lower``; equal ends are legal, the task then tells no cells apart.
        num_cells: cells of one archive, at least 1.
        key: random key.
        num_samples: points that k-means divides, at least ``num_cells``; more make the cells more
            even and take longer.

    Raises:
        ValueError: what `cycleqd_jax.qd.tessellation.task_ranges` refuses, no cell, or fewer
            samples than cells.
    """
    low, high = task_ranges(lower, upper, "CVT")
    if num_cells < 1:
        raise ValueError(f"a CVT needs at least 1 cell, found {num_cells}")
    if num_samples < num_cells:
        raise ValueError(
            f"num_samples: expected at least {num_cells}, one a cell, found {num_samples}"
        )
    # Threads add up k-means' sums in any order; one thread makes the centres repeatable.
    with threadpool_limits(1):
        unit = np.asarray(
            compute_cvt_centroids(low.size - 1, num_samples, num_cells, 0.0, 1.0, key), np.float32
        )
    ends = [(np.delete(low, k), np.delete(high, k)) for k in range(low.size)]
    centres = np.stack([first + (last - first) * unit for first, last in ends])
    return CVT(
        lower=jnp.asarray(low), upper=jnp.asarray(high), centres=jnp.asarray(centres, jnp.float32)
    )
