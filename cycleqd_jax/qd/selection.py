"""Parents: who is drawn from an archive, and how often.

A selector is a QDax ``Selector`` over one archive. Write your own by giving every cell a weight:

    class QualitySelector(WeightedSelector):
        def weights(self, archive):
            return archive.fitnesses[:, 0] ** 2
"""

import abc
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from qdax.core.emitters.repertoire_selectors.selector import Selector

Formula = Literal["paper", "reference"]

SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-30, 1e30
FLOAT32_EPS = float(np.finfo(np.float32).eps)


def occupied_cells(archive: Any) -> Bool[Array, " cells"]:
    """Mask of the cells that hold an elite."""
    return archive.fitnesses[:, 0] != -jnp.inf


def _usable(
    weights: Float[Array, "*archives cells"], occupied: Bool[Array, "*archives cells"], empty: float
) -> Float[Array, "*archives cells"]:
    # What is not a positive number counts as the smallest weight: the elite is drawn last.
    w = weights.astype(jnp.float32)
    w = jnp.where(w > SMALLEST_WEIGHT, jnp.minimum(w, LARGEST_WEIGHT), SMALLEST_WEIGHT)
    return jnp.where(occupied, w, empty)


def draw_without_replacement(
    key: jax.Array,
    weights: Float[Array, " cells"],
    occupied: Bool[Array, " cells"],
    num_samples: int,
) -> Int[Array, " num_samples"]:
    """Cells drawn one after another without replacement, in proportion to their weight.

    With fewer elites than samples the drawn elites repeat in the same order, so a single elite is
    both parents. An elite of weight zero is drawn only when no other is left; with no elite at
    all cell 0 is returned.
    """
    safe = _usable(weights, occupied, 1.0)
    # Adding Gumbel noise and sorting draws from the sequential distribution (Yellott, 1977).
    noise = jax.random.gumbel(key, weights.shape, jnp.float32)
    scores = jnp.where(occupied, jnp.log(safe) + noise, -jnp.inf)
    distinct = min(num_samples, weights.shape[0])
    _, order = jax.lax.top_k(scores, distinct)
    available = jnp.clip(jnp.sum(occupied, dtype=jnp.int32), 1, distinct)
    return order[jnp.arange(num_samples, dtype=jnp.int32) % available]


class WeightedSelector(Selector):
    """Draws elites without replacement with probability proportional to a weight."""

    @abc.abstractmethod
    def weights(self, archive: Any) -> Float[Array, " cells"]:
        """Weight of every cell, not negative; what it says of empty cells is ignored.

        Args:
            archive: a ``MapElitesRepertoire``: fitnesses (C, 1), -inf in empty cells, and
                descriptors (C, K-1).
        """

    def probabilities(self, archive: Any) -> Float[Array, " cells"]:
        """Probability of every cell to be the first one drawn; 0 for empty cells."""
        weights = _usable(self.weights(archive), occupied_cells(archive), 0.0)
        return weights / jnp.sum(weights)

    def select(self, repertoire: Any, key: jax.Array, num_samples: int) -> Any:
        """Select ``num_samples`` elites of one archive; see `draw_without_replacement`.

        Args:
            repertoire: a ``MapElitesRepertoire`` or index view.
            key: random key, used once.
            num_samples: how many, static.

        Returns:
            The same kind of repertoire with ``num_samples`` rows.
        """
        occupied = occupied_cells(repertoire)
        chosen = draw_without_replacement(key, self.weights(repertoire), occupied, num_samples)
        return jax.tree.map(lambda x: x[chosen], repertoire)


@dataclasses.dataclass(frozen=True)
class RandomSelector(WeightedSelector):
    """Every elite of the archive is equally likely."""

    def weights(self, archive: Any) -> Float[Array, " cells"]:
        """One for every cell."""
        return jnp.ones(archive.fitnesses.shape[0], jnp.float32)


@dataclasses.dataclass(frozen=True)
class EliteSelector(WeightedSelector):
    """Elite sampling of CycleQD: good elites at the frontier of every skill are drawn more often.

    ``gamma_j = prod_i (a_lo + norm(f_ji) (a_hi - a_lo))`` over the quality and all behaviour
    characteristics, with norm the min-max normalisation over the archive's elites, 0 where all
    are equal (arXiv 2410.14735, equation 3). The formula "reference" is what the authors' code
    computes: ``a_lo + norm a_hi`` for each factor, with the characteristics entering as bin
    numbers.

    Attributes:
        alpha_low: factor of the weakest elite.
        alpha_high: factor of the best one ("paper"), or the range added to it ("reference").
        formula: "paper" or "reference"; the latter needs an archive with equal numbers of bins
            per task.
    """

    alpha_low: float = 0.5
    alpha_high: float = 0.8
    formula: Formula = "paper"

    def __post_init__(self) -> None:
        if self.formula not in ("paper", "reference"):
            raise ValueError(f"formula must be 'paper' or 'reference', found {self.formula!r}")
        if self.alpha_low < 0 or self.alpha_high < 0:
            raise ValueError(
                f"alphas must not be negative, found {self.alpha_low} and {self.alpha_high}"
            )
        if self.formula == "paper" and self.alpha_low > self.alpha_high:
            raise ValueError(
                f"expected alpha_low <= alpha_high, found {self.alpha_low} > {self.alpha_high}"
            )

    def weights(self, archive: Any) -> Float[Array, " cells"]:
        """``gamma`` of every cell."""
        occupied = occupied_cells(archive)
        reference = self.formula == "reference"
        behaviour = _bin_numbers(archive) if reference else archive.descriptors
        features = jnp.concatenate([archive.fitnesses, behaviour.astype(jnp.float32)], axis=1)
        span = self.alpha_high if reference else self.alpha_high - self.alpha_low
        return jnp.prod(self.alpha_low + span * min_max(features, occupied), axis=1)


def min_max(
    features: Float[Array, "cells features"], occupied: Bool[Array, " cells"]
) -> Float[Array, "cells features"]:
    """Min-max normalisation of columns over occupied cells; 0 if empty or where all are equal."""
    mask = occupied[:, None]
    low = jnp.min(features, axis=0, where=mask, initial=jnp.inf)
    high = jnp.max(features, axis=0, where=mask, initial=-jnp.inf)
    spread = high > low
    scaled = (jnp.where(mask, features, low) - low) / jnp.where(spread, high - low, 1.0)
    return jnp.where(mask & spread, scaled, 0.0)


def _bin_numbers(archive: Any) -> Int[Array, "cells others"]:
    cells, others = archive.centroids.shape
    bins = getattr(archive, "bins", round(cells ** (1 / others)))
    if bins is None or bins**others != cells:
        raise ValueError(
            f"formula 'reference' needs a grid with equal bins per task (see make_grid), found "
            f"{cells} cells for {others} behaviour characteristics"
        )
    return jnp.asarray(np.stack(np.unravel_index(np.arange(cells), (bins,) * others), axis=-1))


def draw_parents(
    selector: Selector,
    repertoire: Any,
    keys: Key[Array, " batch"],
    archive: Int[Array, " batch"],
) -> Int[Array, "batch 2"]:
    """Two parents for every child, as pool indices.

    A `WeightedSelector` weighs each archive once for the whole batch, and two numbers are drawn a
    child. Any other selector, or one that overrides ``select``, is asked once a child with an
    index view of its archive. Both draw from the distribution of `draw_without_replacement`.

    Args:
        selector: a QDax selector.
        repertoire: a repertoire of K archives with ``num_archives`` and ``index_archive``.
        keys: one a child, used once.
        archive: archive each child is bred in.
    """
    if isinstance(selector, WeightedSelector) and type(selector).select is WeightedSelector.select:
        views = jax.vmap(repertoire.index_archive)(
            jnp.arange(repertoire.num_archives, dtype=jnp.int32)
        )
        occupied = jax.vmap(occupied_cells)(views)
        chosen = _draw_pairs(keys, jax.vmap(selector.weights)(views), occupied, archive)
        return views.genotypes[archive[:, None], chosen]
    draw = jax.vmap(lambda key, k: selector.select(repertoire.index_archive(k), key, 2))
    return draw(keys, archive).genotypes


def _draw_pairs(
    keys: Key[Array, " batch"],
    weights: Float[Array, "archives cells"],
    occupied: Bool[Array, "archives cells"],
    archive: Int[Array, " batch"],
) -> Int[Array, "batch 2"]:
    # Inverse transform sampling. Taking the first parent's weight off a sum would leave rounding
    # errors where it dominates; the sums to its left and to its right lose nothing.
    usable = _usable(weights, occupied, 0.0)
    left = _running_sums(usable, occupied)
    right = _running_sums(usable[:, ::-1], occupied[:, ::-1])[:, ::-1]
    u = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys)

    def from_left(v: jax.Array) -> jax.Array:
        # First cell whose sum exceeds v: an empty cell repeats its neighbour's sum.
        return jnp.sum(left[archive] <= v[:, None], axis=1, dtype=jnp.int32)

    first = from_left(u[:, 0] * left[archive, -1])
    first = jnp.minimum(first, left.shape[1] - 1)
    before = jnp.where(first > 0, left[archive, first - 1], 0.0)
    after = jnp.where(first + 1 < left.shape[1], right[archive, first + 1], 0.0)
    v = u[:, 1] * (before + after)
    # Never 0, so that a cell beyond the last elite is out of reach.
    rest = jnp.maximum(after - (v - before), after * FLOAT32_EPS)
    beyond = jnp.sum(right[archive] >= rest[:, None], axis=1, dtype=jnp.int32) - 1
    second = jnp.where(v < before, from_left(v), beyond)
    return jnp.stack([first, jnp.where(before + after > 0, second, first)], axis=1)


def _running_sums(
    weights: Float[Array, "archives cells"], occupied: Bool[Array, "archives cells"]
) -> Float[Array, "archives cells"]:
    # A parallel sum rounds differently from cell to cell; the running maximum over the elites
    # makes it never fall, and stay exactly equal in empty cells.
    sums = jnp.cumsum(weights, axis=1)
    return jax.lax.cummax(jnp.where(occupied, sums, 0.0), axis=1)
