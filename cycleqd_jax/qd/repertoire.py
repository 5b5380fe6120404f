"""The repertoire of CycleQD: one MAP-Elites archive a task over one pool of genotypes."""

from collections.abc import Mapping
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
    def init(
        cls,
        genotypes: Any,
        fitnesses: Any,
        descriptors: Any,
        centroids: Any,
        extra_scores: Mapping[str, Any] | None = None,
        *,
        capacity: int | None = None,
        keys_extra_scores: tuple[str, ...] = (),
        in_place: bool = False,
    ) -> "CyclicRepertoire":
        """Make a repertoire from evaluated genotypes.

        Args:
            genotypes: tree with leaves (B, ...), B >= 1.
            fitnesses: (B, K) scores.
            descriptors: (B, K), the same scores again (QDax passes both).
            centroids: the `Tessellation`, such as a ``Grid`` or a ``CVT``; the name is QDax's.
            extra_scores: name -> tree with leaves (B, ...).
            capacity: slots of the pool. None: the worst case of one elite a cell if that takes at
                most ``FULL_POOL_BYTES``, else what the batch needs; an eager `add` grows it.
            keys_extra_scores: which extra scores to keep.
            in_place: let an eager `add` consume the repertoire it is called on, see the class.

        Raises:
            ValueError: no tessellation, no genotype, wrong number of scores, no row with finite
                scores, an extra score that is missing, or (under jit) too small a capacity.
        """
        if not isinstance(centroids, Tessellation):
            raise ValueError(
                "centroids: expected cells such as make_grid or make_cvt give, found "
                f"{type(centroids).__name__}"
            )
        return cls._start(
            genotypes,
            fitnesses,
            descriptors,
            extra_scores,
            shape=(centroids.num_tasks, centroids.num_cells),
            capacity=capacity,
            keys_extra_scores=keys_extra_scores,
            in_place=in_place,
            tessellation=centroids,
        )

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
