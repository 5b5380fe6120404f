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
    draw_parents,
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


class Archives:
    """A repertoire as `draw_parents` sees it: pool index 100 k + cell in archive k, -1 if empty."""

    def __init__(self, *archives):
        numbered = [
            a.replace(genotypes=jnp.where(a.fitnesses[:, 0] > -jnp.inf, a.genotypes + 100 * k, -1))
            for k, a in enumerate(archives)
        ]
        self.stacked = jax.tree.map(lambda *x: jnp.stack(x), *numbered)
        self.num_archives = len(archives)

    def index_archive(self, k):
        return jax.tree.map(lambda x: x[k], self.stacked)


class Weights(WeightedSelector):
    """Weighs cells with given numbers."""

    def __init__(self, *numbers):
        self.numbers = jnp.asarray(numbers, jnp.float32)

    def weights(self, archive):
        return self.numbers


class OneByOne(EliteSelector):
    """An elite selector that has its own way to select."""

    def select(self, repertoire, key, num_samples):
        return super().select(repertoire, key, num_samples)


def pairs_of(selector, archives, k, count, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    draw = jax.jit(lambda keys, k: draw_parents(selector, archives, keys, k))
    return np.asarray(draw(keys, jnp.full(count, k, jnp.int32)))


def joint_distribution(p):
    joint = np.zeros((CELLS, CELLS))
    for i in range(CELLS):
        for j in range(CELLS):
            if i != j and p[i] > 0:
                joint[i, j] = p[i] * p[j] / (1 - p[i])
    return joint


@pytest.mark.parametrize("selector", [EliteSelector(0.1, 1.0), OneByOne(0.1, 1.0)])
@pytest.mark.parametrize("k", [0, 1])
def test_parents_are_drawn_as_often_as_the_formula_says(selector, k):
    """First parents as gamma; second parents as gamma without the first; on both paths."""
    archives = Archives(archive_of([0, 3, 5, 8], seed=2), archive_of([1, 2, 6], seed=3))
    pairs = pairs_of(selector, archives, k, 20_000) - 100 * k
    p = np.asarray(selector.probabilities(archives.index_archive(k)), np.float64)
    joint = joint_distribution(p)
    found = np.zeros((CELLS, CELLS))
    np.add.at(found, (pairs[:, 0], pairs[:, 1]), 1 / len(pairs))
    assert (found.diagonal() == 0).all()
    # Five standard deviations of a share estimated from 20 000 draws.
    assert (np.abs(found - joint) <= 5 * np.sqrt(joint * (1 - joint) / len(pairs)) + 1e-9).all()


@pytest.mark.slow
def test_children_of_one_batch_may_be_bred_in_different_archives():
    archives = Archives(archive_of([0, 3]), archive_of([1, 2, 6]), archive_of([7]))
    k = jnp.asarray([2, 0, 1, 0, 1], jnp.int32)
    found = draw_parents(RandomSelector(), archives, jax.random.split(jax.random.key(0), 5), k)
    np.testing.assert_array_equal(found // 100, np.repeat(np.asarray(k)[:, None], 2, axis=1))
    assert set(np.asarray(found[1]).tolist()) == {0, 3}
    np.testing.assert_array_equal(found[0], [207, 207])


def test_a_dominating_elite_does_not_blur_the_others():
    """What is left after taking off a weight of 1 is 4e-9, far below the rounding of 1."""
    archives = Archives(archive_of([1, 4, 7]))
    numbers = [0.0, 1e-9, 0.0, 0.0, 1.0, 0.0, 0.0, 3e-9, 0.0]
    pairs = pairs_of(Weights(*numbers), archives, 0, 4000)
    assert (pairs[:, 0] == 4).all()
    share = np.mean(pairs[:, 1] == 7)
    assert set(np.unique(pairs[:, 1])) == {1, 7}
    assert abs(share - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 4000)


def test_only_elites_are_drawn_from_a_sparse_archive_of_any_weights():
    occupied = [2, 3, 6]
    for seed in range(5):
        rng = np.random.default_rng(seed)
        weights = Weights(*(10.0 ** rng.uniform(-25, 25, CELLS)))
        pairs = pairs_of(weights, Archives(archive_of(occupied)), 0, 2000, seed)
        assert set(np.unique(pairs).tolist()) <= set(occupied)
        assert (pairs[:, 0] != pairs[:, 1]).all()


def test_parents_of_weight_zero_infinite_or_not_a_number():
    archives = Archives(archive_of([0, 4, 8]))
    last = pairs_of(Weights(*[np.nan, 0, 0, 0, 1.0, 0, 0, 0, 0.0]), archives, 0, 200)
    assert (last[:, 0] == 4).all()
    assert set(np.unique(last[:, 1])) == {0, 8}
    first = pairs_of(Weights(*[np.inf, 0, 0, 0, 1.0, 0, 0, 0, -1.0]), archives, 0, 200)
    np.testing.assert_array_equal(first, np.tile([0, 4], (200, 1)))


@pytest.mark.parametrize("selector", [EliteSelector(), OneByOne()])
def test_parents_from_one_elite_and_from_none(selector):
    archives = Archives(archive_of([6]), archive_of([]))
    np.testing.assert_array_equal(pairs_of(selector, archives, 0, 8), np.full((8, 2), 6))
    # The pool index of cell 0, which is empty.
    np.testing.assert_array_equal(pairs_of(selector, archives, 1, 8), np.full((8, 2), -1))


def test_an_archive_is_weighed_once_for_the_whole_batch():
    shapes = []

    class Spy(EliteSelector):
        def weights(self, archive):
            shapes.append(archive.fitnesses.shape)
            return super().weights(archive)

    archives = Archives(archive_of([0, 3]), archive_of([1, 2]))
    keys = jax.random.split(jax.random.key(0), 500)
    jaxpr = jax.make_jaxpr(lambda k: draw_parents(Spy(), archives, keys, k))(jnp.zeros(500, int))
    assert shapes == [(CELLS, 1)]
    sizes = [
        v.aval.size
        for e in jaxpr.eqns
        if "log" in str(e.primitive) or "div" in str(e.primitive)
        for v in e.outvars
    ]
    assert max(sizes, default=0) < 500 * CELLS


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
