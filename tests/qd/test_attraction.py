from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.core.containers.mapelites_repertoire import MapElitesRepertoire
from qdax.core.map_elites import MAPElites

from cycleqd_jax.merging.crossover import linear_crossover
from cycleqd_jax.merging.mutation import gaussian_mutation
from cycleqd_jax.qd.attraction import (
    AttractionSelector,
    CompetitionSelector,
    Resources,
    attraction,
)
from cycleqd_jax.qd.emitter import CycleQDEmitter
from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.metrics import qd_metrics
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.qd.selection import EliteSelector, RandomSelector

CELLS, DRAWS = 8, 20_000


def view_of(scores, solved=None):
    """An index view: row c is the elite in cell c (quality first), None an empty cell."""
    width = max(len(row) for row in scores if row is not None)
    table = np.zeros((len(scores), width), np.float32)
    for cell, row in enumerate(scores):
        table[cell] = (-np.inf, *[0.0] * (width - 1)) if row is None else row
    return MapElitesRepertoire(
        genotypes=jnp.arange(len(scores)),
        fitnesses=jnp.asarray(table[:, :1]),
        descriptors=jnp.asarray(table[:, 1:]),
        centroids=jnp.zeros((len(scores), width - 1)),
        extra_scores={} if solved is None else {"solved": jnp.asarray(solved)},
        keys_extra_scores=() if solved is None else ("solved",),
    )


def random_view(seed, occupied=(0, 2, 3, 5, 6), points=12):
    rng = np.random.default_rng(seed)
    scores = [tuple(rng.uniform(size=3)) if c in occupied else None for c in range(CELLS)]
    # What lies in the empty cells must not matter.
    return view_of(scores, rng.random((CELLS, points)) < 0.4)


def numpy_attraction(rows, first, elites, capacity=1.0, alpha=1.0):
    """The published formula, one elite and one data point at a time."""
    g = np.zeros(len(rows))
    for b in elites:
        for j in range(rows.shape[1]):
            z = sum(rows[e, j] for e in elites)
            share = capacity / (z**alpha if z else 1.0)
            g[b] += share * max(rows[b, j] - rows[first, j], 0.0)
    return g


def pairs_of(selector, view, draws=DRAWS, seed=0):
    drawn = jax.jit(lambda key: selector.select(view, key, 2 * draws).genotypes)
    return np.asarray(drawn(jax.random.key(seed))).reshape(draws, 2)


@pytest.mark.parametrize(
    "resources",
    [Resources(), Resources("solved"), Resources("solved", 0.5, 0.5), Resources(None, 2.0, 0.0)],
)
def test_attraction_follows_the_formula(resources):
    view = random_view(seed=1)
    elites = [0, 2, 3, 5, 6]
    rows = np.concatenate([view.fitnesses, view.descriptors], axis=1)
    if resources.points:
        rows = np.asarray(view.extra_scores["solved"], np.float64)
    scores = resources.scores(view)
    for first in elites:
        found = attraction(scores, resources.worth(scores), jnp.int32(first))
        expected = numpy_attraction(rows, first, elites, resources.capacity, resources.alpha)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert found[first] == 0


def test_first_parents_as_the_base_second_as_attracted():
    view = random_view(seed=2)
    base = EliteSelector(0.1, 1.0)
    pairs = pairs_of(AttractionSelector(base, Resources("solved")), view)
    rows = np.asarray(view.extra_scores["solved"], np.float64)
    joint = np.zeros((CELLS, CELLS))
    for a, probability in enumerate(np.asarray(base.probabilities(view), np.float64)):
        if probability:
            g = numpy_attraction(rows, a, [0, 2, 3, 5, 6])
            joint[a] = probability * g / g.sum()
    found = np.zeros((CELLS, CELLS))
    np.add.at(found, (pairs[:, 0], pairs[:, 1]), 1 / DRAWS)
    # Five standard deviations of a share estimated from so many draws.
    assert (np.abs(found - joint) <= 5 * np.sqrt(joint * (1 - joint) / DRAWS) + 1e-9).all()


def test_complementary_pairs_far_more_often_than_uniform():
    """Ten elites solve the first half of the problems, one the second half."""
    half = np.arange(20) < 10
    solved = np.stack([half] * 10 + [~half] + [np.zeros(20, bool)])
    view = view_of([(0.5, 0.5, 0.5)] * 12, solved)
    covered = {}
    for selector in (RandomSelector(), AttractionSelector(RandomSelector(), Resources("solved"))):
        keys = jax.random.split(jax.random.key(1), DRAWS)
        draw = jax.jit(jax.vmap(lambda key, s=selector: s.select(view, key, 2).genotypes))
        pairs = np.asarray(draw(keys))
        team = solved[pairs[:, 0]] | solved[pairs[:, 1]]
        covered[type(selector)] = team.all(axis=1).mean()
    # Uniform: the rare one is among the pair and the other is one of ten: 2 * 10 / (12 * 11).
    assert covered[RandomSelector] < 0.17
    assert covered[AttractionSelector] > 5 * covered[RandomSelector]


def test_competition_weighs_rare_skills():
    view = view_of([(1.0, 0.0), (1.0, 0.0), (1.0, 0.0), (0.0, 1.0), None])
    np.testing.assert_allclose(
        CompetitionSelector().weights(view), [1 / 3, 1 / 3, 1 / 3, 1, 0], rtol=1e-6
    )


class TestEdges:
    def test_nobody_complements_the_first(self):
        """Cell 1 is best everywhere: its mate is the base selector's second draw."""
        view = view_of([(0.1, 0.2), (0.9, 0.9), None, (0.2, 0.1)])
        pairs = pairs_of(AttractionSelector(RandomSelector()), view)
        mates = pairs[pairs[:, 0] == 1, 1]
        assert set(mates) == {0, 3}
        assert abs((mates == 0).mean() - 0.5) < 0.05

    def test_equal_elites_are_drawn_as_the_base_draws(self):
        pairs = pairs_of(AttractionSelector(RandomSelector()), view_of([(0.5, 0.5)] * 4))
        assert (pairs[:, 0] != pairs[:, 1]).all()
        assert len(np.unique(pairs, axis=0)) == 12

    @pytest.mark.parametrize(
        "selector", [AttractionSelector(), AttractionSelector(RandomSelector())]
    )
    def test_a_single_elite_is_both_parents(self, selector):
        np.testing.assert_array_equal(
            pairs_of(selector, view_of([None, (0.3, 0.4), None]), 4), np.ones((4, 2))
        )

    def test_an_empty_archive_gives_cell_zero(self):
        empty = view_of([(0.0, 0.0), (0.0, 0.0)]).replace(fitnesses=jnp.full((2, 1), -jnp.inf))
        np.testing.assert_array_equal(pairs_of(AttractionSelector(), empty, 4), np.zeros((4, 2)))

    def test_scores_below_zero_are_lifted(self):
        below = view_of([(-3.0, 0.2), (-1.0, 0.6), None, (-2.0, 0.1)])
        lifted = view_of([(0.0, 0.2), (2.0, 0.6), None, (1.0, 0.1)])
        np.testing.assert_allclose(Resources().scores(below), Resources().scores(lifted), rtol=1e-6)

    def test_numbers_that_are_not_finite_count_as_the_lowest(self):
        solved = np.asarray([[1.0, np.nan], [0.0, 2.0], [np.inf, -1.0]])
        scores = Resources("solved").scores(view_of([(1.0, 1.0)] * 3, solved))
        np.testing.assert_array_equal(scores, [[1, 0], [0, 3], [0, 0]])

    def test_odd_numbers_of_samples(self):
        view = random_view(seed=3)
        for count in (1, 3):
            select = jax.jit(AttractionSelector().select, static_argnums=2)
            chosen = select(view, jax.random.key(0), count)
            assert chosen.fitnesses.shape == (count, 1)
            assert np.isfinite(np.asarray(chosen.fitnesses)).all()

    def test_equal_selectors_are_equal(self):
        one, same = (AttractionSelector(EliteSelector(), Resources("solved")) for _ in range(2))
        assert one == same
        assert hash(one) == hash(same)
        assert one != AttractionSelector(EliteSelector())


class TestBadInput:
    def test_the_extra_score_is_not_kept(self):
        with pytest.raises(ValueError, match=r"extra score 'passed'.*found \['solved'\]"):
            Resources("passed").scores(random_view(0))

    def test_capacities_do_not_match_the_points(self):
        with pytest.raises(ValueError, match="expected 3 capacities, one a data point, found 2"):
            AttractionSelector(resources=Resources(None, (1.0, 1.0))).select(
                random_view(0), jax.random.key(0), 2
            )

    @pytest.mark.parametrize("capacity", [0.0, (1.0, -1.0), ()])
    def test_capacity_not_positive(self, capacity):
        with pytest.raises(ValueError, match="capacities must be positive"):
            Resources(None, capacity)

    def test_negative_alpha(self):
        with pytest.raises(ValueError, match=r"alpha must not be negative, found -0\.5"):
            Resources(alpha=-0.5)


def score(genotypes, key):
    """Two skills; a problem is solved if its entry is positive."""
    del key
    x = genotypes["x"]
    solved = x > 0
    scores = jnp.stack([solved[:, :8].mean(1), solved[:, 8:].mean(1)], axis=1)
    return scores, scores, {"solved": solved}


@pytest.mark.slow
def test_in_map_elites_asked_and_scanned():
    selector = AttractionSelector(EliteSelector(), Resources("solved"))
    emitter = CycleQDEmitter(selector, linear_crossover(), gaussian_mutation(0.2), 16, 2)
    init = partial(CyclicRepertoire.init, keys_extra_scores=("solved",))
    algorithm = MAPElites(score, emitter, qd_metrics, init)
    genotypes = {"x": jax.random.normal(jax.random.key(0), (12, 16)) - 0.5}
    grid = make_grid([0.0] * 2, [1.0] * 2, 5)

    @jax.jit
    def run():
        repertoire, state, start = algorithm.init(genotypes, grid, jax.random.key(1))
        children, info = algorithm.ask(repertoire, state, jax.random.key(2))
        scores, _, extra = score(children, None)
        repertoire, state, asked = algorithm.tell(
            children, scores, scores, repertoire, state, extra, info
        )
        carry = repertoire, state, jax.random.key(3)
        _, history = jax.lax.scan(algorithm.scan_update, carry, None, length=20)
        return [m["qd_score"].sum(-1) for m in (start, asked, history)]

    start, asked, scanned = run()
    assert start <= asked <= scanned[0]
    assert scanned[-1] > 1.2 * start


def test_index_views_carry_the_extra_scores_that_are_kept():
    scores = jnp.asarray([[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]])
    solved = jnp.asarray([[True, False, False], [False, True, False], [False, False, True]])
    repertoire = CyclicRepertoire.init(
        {"x": scores},
        scores,
        scores,
        make_grid([0.0] * 2, [1.0] * 2, 4),
        {"solved": solved, "dropped": scores},
        keys_extra_scores=("solved",),
    )
    view = repertoire.index_archive(1)
    assert set(view.extra_scores) == {"solved"}
    expected = np.where(view.genotypes[:, None] >= 0, solved[view.genotypes], False)
    np.testing.assert_array_equal(view.extra_scores["solved"], expected)
