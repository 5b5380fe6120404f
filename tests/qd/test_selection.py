from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.core.containers.mapelites_repertoire import MapElitesRepertoire

from cycleqd_jax.qd.selection import (
    EliteSelector,
    RandomSelector,
    WeightedSelector,
    draw_without_replacement,
    min_max,
)

CELLS, OTHERS = 9, 2


def archive_of(occupied, seed=0, scale=1.0):
    """An index view of a 3 x 3 archive with the given cells occupied."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(CELLS, bool)
    mask[list(occupied)] = True
    fitnesses = np.where(mask, scale * rng.normal(size=CELLS), -np.inf).astype(np.float32)
    descriptors = np.where(mask[:, None], rng.normal(size=(CELLS, OTHERS)), 0.0)
    return MapElitesRepertoire(
        genotypes=jnp.arange(CELLS),
        fitnesses=jnp.asarray(fitnesses)[:, None],
        descriptors=jnp.asarray(descriptors, jnp.float32),
        centroids=jnp.zeros((CELLS, OTHERS)),
        extra_scores={},
        keys_extra_scores=(),
    )


def numpy_probabilities(archive, low, high, formula):
    """The published rule, one elite and one factor at a time."""
    quality = np.asarray(archive.fitnesses, np.float64)[:, 0]
    elites = [j for j in range(CELLS) if quality[j] > -np.inf]
    columns = [quality]
    for i in range(OTHERS):
        if formula == "paper":
            columns.append(np.asarray(archive.descriptors, np.float64)[:, i])
        else:
            columns.append(np.asarray([(j // 3, j % 3)[i] for j in range(CELLS)], np.float64))
    gamma = np.zeros(CELLS)
    for j in elites:
        product = 1.0
        for column in columns:
            values = [column[e] for e in elites]
            spread = max(values) - min(values)
            norm = (column[j] - min(values)) / spread if spread else 0.0
            product *= low + norm * (high - low if formula == "paper" else high)
        gamma[j] = product
    return gamma / gamma.sum()


@pytest.mark.parametrize("formula", ["paper", "reference"])
@pytest.mark.parametrize("occupied", [range(9), [1, 4, 8], [0, 7], [5]])
def test_probabilities_follow_the_formula(formula, occupied):
    archive = archive_of(occupied, seed=len(occupied))
    found = EliteSelector(0.5, 0.8, formula).probabilities(archive)
    expected = numpy_probabilities(archive, 0.5, 0.8, formula)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("formula", ["paper", "reference"])
def test_equal_scores_are_legal(formula):
    archive = archive_of([2, 3, 6], scale=0.0)
    archive = archive.replace(descriptors=jnp.zeros((CELLS, OTHERS)))
    found = np.asarray(EliteSelector(0.5, 0.8, formula).probabilities(archive))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(
        found, numpy_probabilities(archive, 0.5, 0.8, formula), rtol=1e-6, atol=1e-7
    )


def test_parents_are_drawn_as_often_as_the_formula_says():
    """First parents as gamma; second parents as gamma without the first."""
    archive = archive_of([0, 3, 5, 8], seed=2)
    selector = EliteSelector(0.1, 1.0)
    keys = jax.random.split(jax.random.key(0), 20_000)
    pairs = np.asarray(jax.vmap(lambda key: selector.select(archive, key, 2).genotypes)(keys))
    p = np.asarray(selector.probabilities(archive), np.float64)
    joint = np.zeros((CELLS, CELLS))
    for i in range(CELLS):
        for j in range(CELLS):
            if i != j and p[i] > 0:
                joint[i, j] = p[i] * p[j] / (1 - p[i])
    found = np.zeros((CELLS, CELLS))
    np.add.at(found, (pairs[:, 0], pairs[:, 1]), 1 / len(pairs))
    assert (found.diagonal() == 0).all()
    # Five standard deviations of a share estimated from 20 000 draws.
    assert (np.abs(found - joint) <= 5 * np.sqrt(joint * (1 - joint) / len(pairs)) + 1e-9).all()


@pytest.mark.parametrize("selector", [EliteSelector(), RandomSelector()])
def test_a_single_elite_is_both_parents(selector):
    view = selector.select(archive_of([6]), jax.random.key(0), 2)
    np.testing.assert_array_equal(view.genotypes, [6, 6])
    assert np.isfinite(np.asarray(view.fitnesses)).all()


def test_few_elites_repeat_after_all_were_drawn():
    view = RandomSelector().select(archive_of([1, 2, 7]), jax.random.key(1), 12)
    chosen = np.asarray(view.genotypes)
    assert set(chosen[:3]) == {1, 2, 7}
    np.testing.assert_array_equal(chosen, np.tile(chosen[:3], 4))


def test_random_selector_is_uniform():
    p = RandomSelector().probabilities(archive_of([0, 2, 4, 8]))
    np.testing.assert_allclose(p, [0.25, 0, 0.25, 0, 0.25, 0, 0, 0, 0.25])


def test_an_elite_of_weight_zero_is_drawn_last():
    class OnlyFirst(WeightedSelector):
        def weights(self, archive):
            return jnp.zeros(CELLS).at[4].set(1.0)

    archive = archive_of([3, 4])
    for key in jax.random.split(jax.random.key(0), 20):
        np.testing.assert_array_equal(OnlyFirst().select(archive, key, 2).genotypes, [4, 3])


def test_an_empty_archive_gives_cell_zero():
    weights, occupied = jnp.ones(4), jnp.zeros(4, bool)
    drawn = draw_without_replacement(jax.random.key(0), weights, occupied, 2)
    np.testing.assert_array_equal(drawn, [0, 0])


def test_min_max_ignores_empty_cells():
    features = jnp.asarray([[1.0], [-99.0], [3.0], [2.0]])
    out = min_max(features, jnp.asarray([True, False, True, True]))
    np.testing.assert_allclose(out[:, 0], [0.0, 0.0, 1.0, 0.5])


def test_equal_selectors_are_equal():
    assert EliteSelector() == EliteSelector(0.5, 0.8)
    assert hash(EliteSelector()) == hash(EliteSelector(0.5, 0.8))
    assert EliteSelector() != EliteSelector(0.4, 0.8)


class TestBadInput:
    def test_alphas_out_of_order(self):
        with pytest.raises(ValueError, match=r"alpha_low <= alpha_high, found 0\.9 > 0\.8"):
            EliteSelector(0.9, 0.8)

    def test_negative_alpha(self):
        with pytest.raises(ValueError, match="must not be negative"):
            EliteSelector(-0.1, 0.8)

    def test_unknown_formula(self):
        wrong: Any = "published"
        with pytest.raises((ValueError, TypeError), match="published"):
            EliteSelector(0.5, 0.8, wrong)

    def test_reference_needs_equal_bins(self):
        archive = archive_of([0]).replace(centroids=jnp.zeros((8, 2)))
        with pytest.raises(ValueError, match="found 8 cells for 2"):
            EliteSelector(formula="reference").weights(archive)
