"""How full and how good the archives are."""

import jax
import jax.numpy as jnp

from cycleqd_jax.qd.insertion import EMPTY
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
    occupied = repertoire.cells != EMPTY
    tasks = jnp.arange(repertoire.num_archives, dtype=jnp.int32)[:, None]
    quality = repertoire.scores[jnp.maximum(repertoire.cells, 0), tasks]
    return {
        "coverage": jnp.mean(occupied, axis=1, dtype=jnp.float32),
        "qd_score": jnp.sum(jnp.where(occupied, quality + qd_offset, 0.0), axis=1),
        "best": jnp.max(jnp.where(occupied, quality, -jnp.inf), axis=1),
        "num_elites": repertoire.num_elites,
    }
