"""The repertoire of CycleQD: one MAP-Elites archive a task over one pool of genotypes."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cycleqd_jax.qd.insertion import Decision, decide
from cycleqd_jax.qd.pool import ArchiveView, PooledRepertoire
from cycleqd_jax.qd.tessellation import Tessellation


class CyclicRepertoire(PooledRepertoire):
    """One MAP-Elites archive a task; a cell keeps the best model that fell into it.

    The insertion rules are those of `cycleqd_jax.qd.insertion`: ties keep the incumbent, an elite
    leaves only for a better one in its cell.

    Attributes:
        tessellation: the cells, a ``Grid`` or a ``CVT``.
    """

    tessellation: Any

    @classmethod
    def rule_fields(cls, rule: Any) -> dict[str, Any]:
        """The `Tessellation`, such as a ``Grid`` or a ``CVT``."""
        if not isinstance(rule, Tessellation):
            raise ValueError(
                "centroids: expected cells such as make_grid or make_cvt give, found "
                f"{type(rule).__name__}"
            )
        return {"tessellation": rule}

    def decide(self, batch_scores: Float[Array, "batch tasks"]) -> Decision:
        """Which rows of a batch would enter which cells; changes nothing."""
        return decide(self.tessellation, self.scores, self.cells, batch_scores)

    def index_archive(self, k: int | Int[Array, ""]) -> ArchiveView:
        """As in `PooledRepertoire`, with the tessellation's centroids (C, K-1)."""
        k = jnp.asarray(k, jnp.int32)
        return (
            super()
            .index_archive(k)
            .replace(centroids=_centroids(self.tessellation, k), bins=self.tessellation.bins)
        )


@jax.jit
def _centroids(tessellation: Tessellation, k: Int[Array, ""]) -> Float[Array, "cells others"]:
    return tessellation.centroids(k)
