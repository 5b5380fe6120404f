"""Attraction: the second parent is chosen for where it complements the first (M2N2).

The elites of an archive compete for data points as for resources. A point j on which many elites
score (large ``z_j``) is worth little, one on which few score is worth much, and an elite b attracts
a first parent a by what it is better at:

    g(a, b) = sum_j  c_j / z_j^alpha  max(s_bj - s_aj, 0),      z_j = sum over elites e of s_ej,

with the capacity ``c_j`` (Abrantes, Lange and Tang, GECCO 2025, arXiv 2508.16204). As in the
authors' code, ``z_j`` is 1 where nobody scores and ``alpha`` is 1 unless one wants less
competition.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from qdax.core.emitters.repertoire_selectors.selector import Selector

from cycleqd_jax.qd.selection import (
    WeightedSelector,
    draw_without_replacement,
    occupied_cells,
)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What the elites of an archive compete for.

    Attributes:
        points: name of an extra score, (C, ...) numbers or booleans, whose entries are the data
            points (which problems an elite solves, say); it must be among the repertoire's
            ``keys_extra_scores``. None: the K scores, quality and behaviour characteristics.
        capacity: ``c_j``, one number for all data points or one each; 1 suits scores in [0, 1].
        alpha: exponent of the competition ``z_j^alpha``; 0 switches it off.
    """

    points: str | None = None
    capacity: float | tuple[float, ...] = 1.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        capacities = self.capacity if isinstance(self.capacity, tuple) else (self.capacity,)
        if min(capacities, default=0.0) <= 0:
            raise ValueError(f"capacities must be positive, found {self.capacity}")
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, found {self.alpha}")

    def scores(self, archive: Any) -> Float[Array, "cells points"]:
        """``s`` of every cell, not negative; 0 in empty cells and where a score is not finite.

        Where an elite's score on a point is negative, the scores of all elites on that point are
        lifted until the lowest is 0, so that shares of a resource stay shares.

        Raises:
            ValueError: the archive keeps no extra score of that name.
        """
        if self.points is None:
            found = jnp.concatenate([archive.fitnesses, archive.descriptors], axis=1)
        elif self.points in archive.extra_scores:
            kept = jnp.asarray(archive.extra_scores[self.points], jnp.float32)
            found = kept.reshape(kept.shape[0], -1)
        else:
            raise ValueError(
                f"expected an extra score '{self.points}' in the archive, found "
                f"{sorted(archive.extra_scores)}: name it in the repertoire's keys_extra_scores"
            )
        known = occupied_cells(archive)[:, None] & jnp.isfinite(found)
        lowest = jnp.min(found, axis=0, initial=0.0, where=known)
        return jnp.where(known, found - lowest, 0.0)

    def worth(self, scores: Float[Array, "cells points"]) -> Float[Array, " points"]:
        """``c_j / z_j^alpha`` of every data point.

        Raises:
            ValueError: the capacities are not one a data point.
        """
        points = scores.shape[1]
        if isinstance(self.capacity, tuple) and len(self.capacity) != points:
            raise ValueError(
                f"expected {points} capacities, one a data point, found {len(self.capacity)}"
            )
        taken = jnp.sum(scores, axis=0)
        capacity = jnp.asarray(self.capacity, jnp.float32)
        return capacity / jnp.where(taken > 0, taken, 1.0) ** self.alpha


def attraction(
    scores: Float[Array, "cells points"],
    worth: Float[Array, " points"],
    first: Int[Array, ""],
) -> Float[Array, " cells"]:
    """Attraction ``g(first, b)`` of every cell b to the elite in cell ``first``.

    Args:
        scores: (C, J) not negative, 0 in empty cells, see `Resources.scores`.
        worth: (J,) ``c_j / z_j^alpha``, see `Resources.worth`.
        first: cell of the first parent.
    """
    return jnp.sum(jnp.maximum(scores - scores[first], 0.0) * worth, axis=1)


@dataclasses.dataclass(frozen=True)
class CompetitionSelector(WeightedSelector):
    """Elites in proportion to the resources they win, ``f_b = sum_j c_j s_bj / z_j^alpha``.

    The first parent of M2N2: a rare skill is worth more than a common one.

    Attributes:
        resources: what they compete for.
    """

    resources: Resources = Resources()

    def weights(self, archive: Any) -> Float[Array, " cells"]:
        """``f`` of every cell."""
        scores = self.resources.scores(archive)
        return jnp.sum(scores * self.resources.worth(scores), axis=1)


@dataclasses.dataclass(frozen=True)
class AttractionSelector(Selector):
    """First parent by the weights of another selector, second in proportion to its attraction.

    Rows come in pairs, each drawn anew: row 2i is a first parent, row 2i + 1 its mate; an odd
    last row is a first parent. Where no elite complements the first parent (it is the best on
    every point) the mate is the one that the base selector draws second, without replacement. A
    single elite is both parents; an empty archive gives cell 0, as with the other selectors.

    Attributes:
        base: draws the first parent; M2N2's own is `CompetitionSelector`.
        resources: the data points on which parents complement each other.
    """

    base: WeightedSelector = CompetitionSelector()
    resources: Resources = Resources()

    def select(self, repertoire: Any, key: jax.Array, num_samples: int) -> Any:
        """Select pairs of one archive, see the class.

        Args:
            repertoire: a ``MapElitesRepertoire`` or index view.
            key: random key, used once.
            num_samples: rows, static.

        Raises:
            ValueError: see `Resources`.
        """
        occupied = occupied_cells(repertoire)
        weights = self.base.weights(repertoire)
        scores = self.resources.scores(repertoire)
        worth = self.resources.worth(scores)
        keys = jax.random.split(key, math.ceil(num_samples / 2))
        pairs = jax.vmap(_draw_pair, in_axes=(0, None, None, None, None))(
            keys, weights, occupied, scores, worth
        )
        chosen = pairs.ravel()[:num_samples]
        return jax.tree.map(lambda x: x[chosen], repertoire)


def _draw_pair(
    key: jax.Array,
    weights: Float[Array, " cells"],
    occupied: Bool[Array, " cells"],
    scores: Float[Array, "cells points"],
    worth: Float[Array, " points"],
) -> Int[Array, " 2"]:
    base_key, mate_key = jax.random.split(key)
    first, second = draw_without_replacement(base_key, weights, occupied, 2)
    pull = attraction(scores, worth, first)
    # log 0 = -inf: an elite that adds nothing is never drawn while another one adds something.
    mate = jax.random.categorical(mate_key, jnp.log(pull))
    return jnp.stack([first, jnp.where(jnp.any(pull > 0), mate, second)]).astype(jnp.int32)
