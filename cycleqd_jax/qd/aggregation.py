"""The final model: the best elite of every archive, merged by softmax of quality."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cycleqd_jax.qd.insertion import EMPTY, is_traced


@runtime_checkable
class Archives(Protocol):
    """What is asked of a repertoire: scores of a pool, and per archive who is in it."""

    @property
    def scores(self) -> Any:
        """Scores of the pool, (P, K)."""

    @property
    def cells(self) -> Any:
        """Pool indices of each archive's elites, (K, C) int32, -1 = empty."""


def best_elites(repertoire: Archives) -> Int[Array, " tasks"]:
    """Pool index of the best elite of every archive, -1 for an empty archive.

    On a tie of quality the one with the higher mean score, then the one in the first cell.
    Nothing of the pool but scores is read.
    """
    return _best_elites(repertoire.scores, repertoire.cells)


@jax.jit
def _best_elites(
    pool_scores: Float[Array, "capacity tasks"], cells: Int[Array, "tasks cells"]
) -> Int[Array, " tasks"]:
    tasks = jnp.arange(cells.shape[0], dtype=jnp.int32)
    occupied = cells != EMPTY
    scores = pool_scores[jnp.maximum(cells, 0)]
    quality = jnp.take_along_axis(scores, tasks[:, None, None], axis=2)[..., 0]
    tied = _largest(quality, occupied)
    # Masks, not -inf for what does not compete: an elite's own score may be -inf.
    first = jnp.argmax(_largest(jnp.mean(scores, axis=2), tied), axis=1)
    return jnp.where(occupied.any(axis=1), cells[tasks, first], EMPTY)


def _largest(
    values: Float[Array, "tasks cells"], among: Bool[Array, "tasks cells"]
) -> Bool[Array, "tasks cells"]:
    most = jnp.max(values, axis=1, keepdims=True, initial=-jnp.inf, where=among)
    return among & (values == most)


def softmax_weights(
    quality: Float[Array, " tasks"], temperature: Any = 1.0
) -> Float[Array, " tasks"]:
    """Mixing weights ``beta = softmax(quality / temperature)`` (arXiv 2410.14735, section 3.4).

    A temperature towards 0 picks the best elite (equally good ones alike), a large one weights
    all alike; it must be positive. A quality of -inf, an empty archive's, has weight 0.

    Raises:
        ValueError: a Python number that is not positive, or outside jit no finite quality or a
            NaN or +inf among them.
    """
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
    quality = quality.astype(jnp.float32)
    if not is_traced(quality):
        values = np.asarray(quality)
        if not np.isfinite(values).any() or np.isnan(values).any() or np.isposinf(values).any():
            raise ValueError(
                "quality: expected finite numbers, or -inf for an empty archive, found "
                f"{values.tolist()}"
            )
    # The difference first: quality / temperature may overflow, and the best one's weight with it.
    behind = quality - jnp.max(quality)
    scaled = jnp.where(behind < 0, behind / jnp.asarray(temperature, jnp.float32), 0.0)
    return jax.nn.softmax(scaled)


def aggregate(genotypes: Any, quality: Float[Array, " tasks"], temperature: Any = 1.0) -> Any:
    """Merged genotype ``sum_k beta_k g_k``, in the dense or the spectral space alike.

    Args:
        genotypes: tree with leaves (K, ...), the best elite of every archive; what stands in the
            row of an empty archive does not matter.
        quality: (K,) its score on its own task, -inf for an empty archive.
        temperature: see `softmax_weights`.

    Returns:
        Tree with leaves (...), dtype kept, summed in float32.

    Raises:
        ValueError: a leaf's first axis is not K, or what `softmax_weights` refuses.
    """
    for leaf in jax.tree.leaves(genotypes):
        if jnp.shape(leaf)[:1] != quality.shape:
            raise ValueError(
                f"expected genotypes with {quality.shape[0]} rows, one a quality, "
                f"found shape {jnp.shape(leaf)}"
            )
    beta = softmax_weights(quality, temperature)

    def mix(x: jax.Array) -> jax.Array:
        # A leftover of weight 0 may hold anything, and 0 times NaN is NaN.
        rows = jnp.where((beta > 0).reshape(-1, *[1] * (x.ndim - 1)), x.astype(jnp.float32), 0.0)
        total = jnp.tensordot(beta, rows, axes=1, precision=jax.lax.Precision.HIGHEST)
        return total.astype(x.dtype)

    return jax.tree.map(mix, genotypes)
