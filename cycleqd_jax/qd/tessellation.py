"""What tells an archive's cells apart: the protocol that the kinds of cells share.

In archive k the score on task k is the quality and the other K - 1 scores choose the cell (Kuroki
et al., arXiv 2410.14735). `cycleqd_jax.qd.grid` has equal bins, whose number grows as ``bins **
(K - 1)``; `cycleqd_jax.qd.cvt` has as many cells as you ask for, whatever K is.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@runtime_checkable
class Tessellation(Protocol):
    """Cells of K archives, the same number in each. A pytree, so that it can enter kernels.

    Attributes:
        lower: (K,) float32, lower end of each task's range.
        upper: (K,) float32, upper end.
    """

    lower: Any
    upper: Any

    @property
    def num_tasks(self) -> int:
        """Number of tasks K, at least 2."""

    @property
    def num_cells(self) -> int:
        """Cells of one archive, C."""

    @property
    def bins(self) -> int | None:
        """Bins per task where the cells are an equal grid in row-major order, else None."""

    def cell_of(
        self, scores: Float[Array, "batch tasks"], k: int | Int[Array, ""]
    ) -> Int[Array, " batch"]:
        """Cell of every row in archive k (may be traced), in ``0 .. C - 1`` even for NaN."""

    def centroids(self, k: int | Int[Array, ""]) -> Float[Array, "cells others"]:
        """Centres of archive k's cells in the order of `cell_of`."""


def other_tasks(num_tasks: int, k: int | Int[Array, ""]) -> Int[Array, " others"]:
    """Tasks that choose the cell in archive k, in task order: shape (K-1,); ``k`` may be traced."""
    position = jnp.arange(num_tasks - 1, dtype=jnp.int32)
    return position + (position >= k).astype(jnp.int32)


def task_ranges(lower: Any, upper: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Check the ends of every task's range.

    Args:
        lower: (K,) concrete numbers, K >= 2.
        upper: (K,) not below ``lower``.
        name: what the ranges are for, for the errors.

    Returns:
        Both as float32.

    Raises:
        ValueError: fewer than two tasks, shapes that differ, ends out of order or not finite.
    """
    low, high = _as_range(lower, f"{name} lower"), _as_range(upper, f"{name} upper")
    if low.shape != high.shape:
        raise ValueError(
            f"{name} lower and upper must have one shape, found {low.shape} and {high.shape}"
        )
    if (low > high).any():
        task = int(np.argmax(low > high))
        raise ValueError(
            f"{name} of task {task}: expected lower <= upper, found {low[task]} > {high[task]}"
        )
    return low, high


def _as_range(values: Any, name: str) -> np.ndarray:
    array = np.asarray(values, np.float32)
    if array.ndim != 1 or array.size < 2:
        raise ValueError(
            f"{name} must hold one number for each of at least 2 tasks (with one task no "
            f"behaviour tells cells apart), found shape {array.shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, found {array.tolist()}")
    return array


def expert_ranges(
    scores: Any, low: float = 0.85, high: float = 1.15
) -> tuple[np.ndarray, np.ndarray]:
    """Range of every task: from 85% of the weakest to 115% of the best expert.

    Args:
        scores: (E, K) score of every expert on every task, at least one expert, finite.
        low: share of the weakest expert's score at which the range begins.
        high: share of the best expert's score at which it ends.

    Returns:
        ``lower`` (K,) and ``upper`` (K,), for ``make_grid`` or ``make_cvt``.

    Raises:
        ValueError: the table's shape is not (E, K).
    """
    table = np.asarray(scores, np.float32)
    if table.ndim != 2 or table.shape[0] < 1:
        raise ValueError(f"expected expert scores of shape (experts, tasks), found {table.shape}")
    weakest, best = table.min(axis=0), table.max(axis=0)
    # A share of a negative score moves the end inwards, so it is taken the other way round.
    lower = np.where(weakest >= 0, low * weakest, weakest / low if low else weakest)
    upper = np.where(best >= 0, high * best, best / high if high else best)
    return lower, upper


def bounds(
    lower: jax.Array, upper: jax.Array, k: int | Int[Array, ""]
) -> tuple[jax.Array, jax.Array]:
    """Ranges of archive k's behaviour characteristics: lower (K-1,) and upper (K-1,)."""
    others = other_tasks(lower.shape[0], k)
    return jnp.take(lower, others), jnp.take(upper, others)
