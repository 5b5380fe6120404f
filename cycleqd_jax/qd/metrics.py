"""How full and how good the archives are."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cycleqd_jax.qd.insertion import EMPTY, occupied_slots
from cycleqd_jax.qd.repertoire import CyclicRepertoire


def qd_metrics(repertoire: CyclicRepertoire, qd_offset: float = 0.0) -> dict[str, jax.Array]:
    """Metrics of all archives; fits ``MAPElites(metrics_function=...)``.

    Args:
        repertoire: the repertoire.
        qd_offset: added to every elite's quality, so that a task with negative scores still has a
            QD score that grows with every elite.

    Returns:
        ``coverage`` (K,) share of occupied cells in [0, 1] (QDax gives percent), ``qd_score``
        (K,) sum of the elites' qualities plus offset, ``best`` (K,) best quality, -inf in an
        empty archive, and ``num_elites``, the number of distinct elites.
    """
    # Only the tables go in: the pool's size and shape must not matter to the compiled function.
    return _metrics(repertoire.scores, repertoire.cells, jnp.asarray(qd_offset, jnp.float32))


@jax.jit
def _metrics(
    scores: Float[Array, "capacity tasks"],
    cells: Int[Array, "tasks cells"],
    qd_offset: Float[Array, ""],
) -> dict[str, jax.Array]:
    occupied = cells != EMPTY
    tasks = jnp.arange(cells.shape[0], dtype=jnp.int32)[:, None]
    quality = scores[jnp.maximum(cells, 0), tasks]
    return {
        "coverage": jnp.mean(occupied, axis=1, dtype=jnp.float32),
        "qd_score": jnp.sum(jnp.where(occupied, quality + qd_offset, 0.0), axis=1),
        "best": jnp.max(jnp.where(occupied, quality, -jnp.inf), axis=1),
        "num_elites": jnp.sum(occupied_slots(cells, scores.shape[0]), dtype=jnp.int32),
    }
