"""The final model: the best elite of every archive, merged by softmax of quality."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cycleqd_jax.qd.insertion import EMPTY
from cycleqd_jax.qd.pool import PooledRepertoire


def best_elites(repertoire: PooledRepertoire) -> Int[Array, " tasks"]:
    """Pool index of the best elite of every archive, -1 for an empty archive.

    On a tie of quality the one with the higher mean score, then the one in the first cell.
    """
    return _best_elites(repertoire.scores, repertoire.cells)


@jax.jit
def _best_elites(
    pool_scores: Float[Array, "capacity tasks"], cells: Int[Array, "tasks cells"]
) -> Int[Array, " tasks"]:
    tasks = jnp.arange(cells.shape[0], dtype=jnp.int32)
    scores = pool_scores[jnp.maximum(cells, 0)]
    quality = jnp.take_along_axis(scores, tasks[:, None, None], axis=2)[..., 0]
    quality = jnp.where(cells == EMPTY, -jnp.inf, quality)
    tied = quality == jnp.max(quality, axis=1, keepdims=True)
    mean = jnp.where(tied, jnp.mean(scores, axis=2), -jnp.inf)
    return cells[tasks, jnp.argmax(mean, axis=1)]


def softmax_weights(
    quality: Float[Array, " tasks"], temperature: Any = 1.0
) -> Float[Array, " tasks"]:
    """Mixing weights ``beta = softmax(quality / temperature)`` (arXiv 2410.14735, section 3.4).

    A temperature towards 0 picks the best elite, a large one weights all alike; it must be
    positive.

    Raises:
        ValueError: a Python number that is not positive.
    """
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
    return jax.nn.softmax(quality.astype(jnp.float32) / jnp.asarray(temperature, jnp.float32))


def aggregate(genotypes: Any, quality: Float[Array, " tasks"], temperature: Any = 1.0) -> Any:
    """Merged genotype ``sum_k beta_k g_k``, in the dense or the spectral space alike.

    Args:
        genotypes: tree with leaves (K, ...), the best elite of every archive.
        quality: (K,) its score on its own task.
        temperature: see `softmax_weights`.

    Returns:
        Tree with leaves (...), dtype kept, summed in float32.

    Raises:
        ValueError: a leaf's first axis is not K.
    """
    for leaf in jax.tree.leaves(genotypes):
        if jnp.shape(leaf)[:1] != quality.shape:
            raise ValueError(
                f"expected genotypes with {quality.shape[0]} rows, one a quality, "
                f"found shape {jnp.shape(leaf)}"
            )
    beta = softmax_weights(quality, temperature)

    def mix(x: jax.Array) -> jax.Array:
        total = jnp.tensordot(
            beta, x.astype(jnp.float32), axes=1, precision=jax.lax.Precision.HIGHEST
        )
        return total.astype(x.dtype)

    return jax.tree.map(mix, genotypes)
