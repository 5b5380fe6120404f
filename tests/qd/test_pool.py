"""What every repertoire must do, whatever decides who enters: a property of each kind."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.core.containers.mapelites_repertoire import MapElitesRepertoire
from qdax.core.emitters.multi_emitter import MultiEmitter
from qdax.core.emitters.mutation_operators import isoline_variation
from qdax.core.emitters.repertoire_selectors.uniform_selector import UniformSelector
from qdax.core.emitters.standard_emitters import MixingEmitter
from qdax.core.map_elites import MAPElites
from qdax.utils.metrics import default_qd_metrics

from cycleqd_jax.merging.crossover import linear_crossover
from cycleqd_jax.merging.mutation import gaussian_mutation
from cycleqd_jax.qd.aggregation import best_elites
from cycleqd_jax.qd.cvt import make_cvt
from cycleqd_jax.qd.dns import DominatedNoveltyRepertoire, make_dominated_novelty
from cycleqd_jax.qd.emitter import CycleQDEmitter
from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.metrics import qd_metrics
from cycleqd_jax.qd.pool import PooledRepertoire
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.qd.selection import EliteSelector

SIZE = 10


def grid(tasks):
    return CyclicRepertoire, make_grid([0.0] * tasks, [1.0] * tasks, 4)


def cvt(tasks):
    cells = make_cvt([0.0] * tasks, [1.0] * tasks, 9, jax.random.key(0), num_samples=100)
    return CyclicRepertoire, cells


def dns(tasks):
    return DominatedNoveltyRepertoire, make_dominated_novelty(tasks, 9)


KINDS: dict[str, Any] = {"grid": grid, "cvt": cvt, "dns": dns}

every_kind = pytest.mark.parametrize("kind", KINDS)


def score(tasks, genotypes, key):
    """Skills that cannot all be had: closeness to corners."""
    del key
    corners = jnp.eye(tasks, SIZE)
    scores = jnp.exp(-jnp.sum((genotypes["x"][:, None] - corners) ** 2, axis=-1))
    return scores, scores, {"id": jnp.arange(scores.shape[0])}


def population(count=16, seed=0):
    return {"x": jax.random.uniform(jax.random.key(seed), (count, SIZE))}


@functools.cache
def make(kind, count=16, **options):
    cls, rule = KINDS[kind](3)
    genotypes = population(count)
    scores, _, extra = score(3, genotypes, None)
    return cls.init(genotypes, scores, scores, rule, extra, **options)


def algorithm(kind, emitter, tasks=3):
    cls, rule = KINDS[kind](tasks)
    search = MAPElites(
        functools.partial(score, tasks),
        emitter,
        qd_metrics,
        functools.partial(cls.init, keys_extra_scores=("id",)),
    )
    return search, *search.init(population(), rule, jax.random.key(0))


def emitter_of(tasks=3, batch=8, selector=None):
    return CycleQDEmitter(
        selector or EliteSelector(),
        linear_crossover(1.0, 0.3),
        gaussian_mutation(0.1),
        batch,
        tasks,
    )


# The grid's turn in a search is in test_emitter.
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tasks"), [("cvt", 10), ("dns", 2)])
def test_a_scanned_search_improves(kind, tasks):
    search, repertoire, state, before = algorithm(kind, emitter_of(tasks), tasks)
    carry = (repertoire, state, jax.random.key(3))
    (after, state, _), history = jax.jit(
        lambda c: jax.lax.scan(search.scan_update, c, None, length=6)
    )(carry)
    assert int(state.generation) == 6
    assert (np.diff(history["best"], axis=0) >= 0).all()
    assert float(history["best"][-1].sum()) > float(before["best"].sum())
    assert (best_elites(after) >= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tasks"), [("cvt", 2), ("dns", 10)])
def test_asked_and_told_beside_a_qdax_emitter_in_a_multi_emitter(kind, tasks):
    iso_line = functools.partial(isoline_variation, iso_sigma=0.05, line_sigma=0.1)
    ours = emitter_of(tasks, 8, UniformSelector(select_with_replacement=False))
    emitter = MultiEmitter((ours, MixingEmitter(lambda x, k: x, iso_line, 1.0, 4)))
    search, repertoire, state, before = algorithm(kind, emitter, tasks)
    for key in jax.random.split(jax.random.key(2), 3):
        children, _ = search.ask(repertoire, state, key)
        assert children["x"].shape == (12, SIZE)
        fitnesses, descriptors, extra = score(tasks, children, None)
        repertoire, state, metrics = search.tell(
            children, fitnesses, descriptors, repertoire, state, extra
        )
    assert int(state.emitter_states[0].generation) == 3
    assert float(metrics["best"].sum()) > float(before["best"].sum())


@every_kind
def test_archives_are_qdax_repertoires(kind):
    repertoire = make(kind, keys_extra_scores=("id",))
    ours = qd_metrics(repertoire, 2.0)
    for k in range(3):
        view = repertoire.archive(k)
        assert isinstance(view, MapElitesRepertoire)
        occupied = np.asarray(repertoire.cells[k]) >= 0
        rows = np.asarray(view.extra_scores["id"])[occupied]
        np.testing.assert_array_equal(
            np.asarray(view.genotypes["x"])[occupied], population()["x"][rows]
        )
        kept = np.asarray(score(3, population(), None)[0])[rows]
        np.testing.assert_array_equal(np.asarray(view.fitnesses)[occupied, 0], kept[:, k])
        np.testing.assert_array_equal(
            np.asarray(view.descriptors)[occupied], np.delete(kept, k, axis=1)
        )
        theirs = default_qd_metrics(view, 2.0)
        assert float(ours["coverage"][k]) == pytest.approx(float(theirs["coverage"]) / 100)
        assert float(ours["qd_score"][k]) == pytest.approx(float(theirs["qd_score"]), rel=1e-5)
        assert float(ours["best"][k]) == float(theirs["max_fitness"])


@every_kind
def test_qdax_uniform_selector_reaches_every_elite_and_no_other(kind):
    repertoire = make(kind)
    view = repertoire.archive(1)
    chosen = UniformSelector().select(view, jax.random.key(0), 300)
    elites = np.unique(np.asarray(view.fitnesses)[np.asarray(repertoire.cells[1]) >= 0])
    np.testing.assert_array_equal(np.unique(chosen.fitnesses), elites)
    assert repertoire.select(jax.random.key(0), 7).genotypes["x"].shape == (7, SIZE)


@every_kind
def test_decide_tells_what_add_does(kind):
    repertoire = make(kind)
    children = population(8, seed=5)
    scores, _, _ = score(3, children, None)
    decision = repertoire.decide(scores)
    after = repertoire.add(children, scores, scores)
    entered = {
        row
        for row in range(8)
        if (np.asarray(after.scores) == np.asarray(scores[row])).all(axis=1).any()
    }
    assert 0 < len(entered) < 8
    assert entered == set(np.flatnonzero(decision.accepted).tolist())
    assert int(decision.slots_needed) == int(after.num_elites)


@every_kind
def test_dtypes_are_kept_and_the_pool_grows_eagerly_only(kind):
    repertoire = make(kind, capacity=1)
    assert repertoire.genotypes["x"].dtype == jnp.float32
    assert 1 < int(repertoire.num_elites) <= repertoire.capacity <= repertoire.cells.size
    small = repertoire.replace(scores=repertoire.scores[:2])
    scores = jnp.ones((1, 3))
    with pytest.raises(ValueError, match=rf"capacity 2 cannot grow.*capacity={small.cells.size}"):
        jax.jit(lambda r: r.add({"x": jnp.ones((1, SIZE))}, scores, scores))(
            small.replace(genotypes={"x": small.genotypes["x"][:2]})
        )


@every_kind
def test_no_scores_at_all_leave_the_archives_alone(kind):
    repertoire = make(kind)
    bad = jnp.full((4, 3), jnp.nan)
    after = repertoire.add(population(4, seed=1), bad, bad)
    jax.tree.map(np.testing.assert_array_equal, after, repertoire)


def test_the_authors_formula_wants_a_grid():
    selector = EliteSelector(formula="reference")
    grid_view = make("grid").index_archive(0)
    assert grid_view.bins == 4
    assert np.isfinite(np.asarray(selector.weights(grid_view))).all()
    # Nine cells for two characteristics could be a grid, but are not one.
    for kind in ("cvt", "dns"):
        view = make(kind).index_archive(0)
        assert view.centroids.shape == (9, 2)
        with pytest.raises(ValueError, match="needs a grid with equal bins per task"):
            selector.select(view, jax.random.key(0), 2)


@every_kind
class TestBadInput:
    def test_wrong_number_of_scores(self, kind):
        with pytest.raises(ValueError, match=r"fitnesses: expected.*\(4, 3\).*found \(4, 2\)"):
            make(kind).add(population(4), jnp.ones((4, 3)), jnp.ones((4, 2)))

    def test_scores_of_another_number_of_tasks_at_the_start(self, kind):
        cls, rule = KINDS[kind](3)
        scores = jnp.ones((4, 2))
        with pytest.raises(ValueError, match=r"fitnesses: expected.*\(4, 3\).*found \(4, 2\)"):
            cls.init(population(4), scores, scores, rule)

    def test_a_leaf_of_another_shape(self, kind):
        scores = jnp.ones((4, 3))
        with pytest.raises(ValueError, match=r"leaf 'x': expected shape \(10,\).*found \(6,\)"):
            make(kind).add({"x": jnp.ones((4, 6))}, scores, scores)

    def test_another_leaf(self, kind):
        scores = jnp.ones((4, 3))
        with pytest.raises(ValueError, match="leaf 'x' of the pool is missing"):
            make(kind).add({"y": jnp.ones((4, SIZE))}, scores, scores)

    def test_an_empty_start(self, kind):
        with pytest.raises(ValueError, match="at least one evaluated genotype, found an empty"):
            make(kind, count=0)

    def test_archives_that_would_be_empty(self, kind):
        cls, rule = KINDS[kind](3)
        bad = jnp.full((4, 3), jnp.nan)
        with pytest.raises(ValueError, match="3 finite scores, found none among 4"):
            cls.init(population(4), bad, bad, rule)

    def test_one_task(self, kind):
        with pytest.raises(ValueError, match=r"at least 2 tasks.*found"):
            KINDS[kind](1)


def test_the_base_class_decides_nothing():
    with pytest.raises(TypeError, match="abstract"):
        PooledRepertoire(None, None, None, None, ())
