from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.core.emitters.multi_emitter import MultiEmitter
from qdax.core.emitters.mutation_operators import isoline_variation
from qdax.core.emitters.standard_emitters import MixingEmitter
from qdax.core.map_elites import MAPElites

from cycleqd_jax.merging.crossover import linear_crossover
from cycleqd_jax.merging.mutation import gaussian_mutation, no_mutation
from cycleqd_jax.qd.adaptation import ControlState, learn
from cycleqd_jax.qd.control import ControlledEmitter, parent_features
from cycleqd_jax.qd.cvt import CVT
from cycleqd_jax.qd.dns import DominatedNoveltyRepertoire, make_dominated_novelty
from cycleqd_jax.qd.emitter import breed
from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.metrics import qd_metrics
from cycleqd_jax.qd.parametric import (
    Parameter,
    parametric,
    parametric_crossover,
    parametric_mutation,
)
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.qd.schedule import cycle_per_child
from cycleqd_jax.qd.selection import EliteSelector, RandomSelector

K, BATCH, GENERATIONS = 2, 64, 60
LAST = 20
"""Generations looked at in the end: more than one, as a search may just have begun anew."""
GRID = make_grid([0.0] * K, [2.0] * K, 10)


def score(genotypes, key):
    """The genotype is its own two scores."""
    del key
    return genotypes["x"], genotypes["x"], {}


def search(emitter, outputs, fixed, seed, top=2.0):
    """Total QD score at the end, and the info of the last batches with their parents' scores.

    If ``fixed``, every candidate is the constant map to ``outputs``, whatever is learned.
    """
    algorithm = MAPElites(score, emitter, qd_metrics, CyclicRepertoire.init)
    first = {
        "x": jax.random.uniform(jax.random.key(seed), (16, K)) * jnp.asarray([0.2, 1.0]),
        "miss": jnp.zeros(16),
    }
    grid = make_grid([0.0] * K, [top] * K, 10)
    repertoire, state, _ = algorithm.init(first, grid, jax.random.key(seed + 100))
    constant = jnp.zeros((2 * K - 1, outputs.size)).at[-1].set(outputs).ravel()

    def generation(carry, key):
        repertoire, state = carry
        state = state.replace(candidates=jnp.where(fixed, constant, state.candidates))
        children, info = algorithm.ask(repertoire, state, key)
        info["parents"] = repertoire.scores[info["parents"]]
        scores = children["x"]
        repertoire, state, metrics = algorithm.tell(children, scores, scores, repertoire, state)
        return (repertoire, state), (metrics["qd_score"].sum(), info)

    keys = jax.random.split(jax.random.key(seed + 200), GENERATIONS)
    _, (qd_score, info) = jax.lax.scan(generation, (repertoire, state), keys)
    return qd_score[-1], jax.tree.map(lambda x: x[-LAST:], info)


def compare(crossover, mutation, schedule, fixed, selector=None, seeds=2, **options):
    """Learned QD scores (seeds,) and info, and QD scores (values, seeds) of fixed parameters."""
    parts = selector or EliteSelector(), crossover, mutation, BATCH, K
    emitter = ControlledEmitter(*parts, schedule=schedule)
    ends = np.asarray([(p.low, p.start, p.high) for p in emitter.parameters])
    low, start, high = ends.T
    logit = [np.log((v - low) / (high - v)) for v in (start, np.asarray(fixed))]
    outputs = np.concatenate([np.zeros((1, low.size)), logit[1] - logit[0]])
    run = jax.vmap(partial(search, emitter, **options), in_axes=(None, None, 0))
    everything = jax.jit(jax.vmap(run, in_axes=(0, 0, None)))
    scores, info = everything(jnp.asarray(outputs), jnp.arange(len(outputs)) > 0, jnp.arange(seeds))
    info = jax.tree.map(np.asarray, info)
    np.testing.assert_allclose(info["parameters"][1:, 0, -1, 0], fixed, rtol=1e-3, atol=1e-3)
    return np.asarray(scores[0]), jax.tree.map(lambda x: x[0], info), np.asarray(scores[1:])


def keep_first(values, key, a, b):
    return a


def keep(values, key, genotype, expert):
    return genotype


class TestLearning:
    """Problems whose best parameters are known."""

    @pytest.mark.slow
    def test_crossover_weights_and_a_strength_for_every_archive(self):
        """Children gain near w1 = 1.5, w2 = -0.5 (the start is 1, 1), and with small steps in
        archive 0 but large ones in archive 1: no fixed strength serves both.
        """
        best = jnp.asarray([0.02, 0.4])

        def merge(values, key, a, b):
            return {"x": a["x"], "miss": jnp.sum((values - jnp.asarray([1.5, -0.5])) ** 2)}

        def mutate(values, key, genotype, expert):
            miss = genotype["miss"] + jnp.log(values[0] / best[expert]) ** 2
            gain = 0.1 * jnp.exp(-miss / 2) - 0.02
            x = genotype["x"] + jnp.where(jnp.arange(K) == expert, gain, 0.0)
            return {"x": x, "miss": genotype["miss"]}

        crossover = parametric(merge, *parametric_crossover().parameters)
        mutation = parametric(mutate, *parametric_mutation(no_mutation()).parameters)
        # Even with the right weights given.
        fixed = [[1.5, -0.5, w] for w in (0.02, 0.04, 0.1, 0.2, 0.4)] + [[1.0, 1.0, 0.1]]
        learned, info, others = compare(crossover, mutation, cycle_per_child, fixed)
        for archive, strength in enumerate(np.asarray(best)):
            mine = info["archive"][0, -1] == archive
            values = np.median(info["parameters"][:, :, mine], axis=(1, 2))
            assert (np.abs(values[:, :2] - [1.5, -0.5]) < 0.3).all()
            np.testing.assert_allclose(values[:, 2], strength, rtol=0.5)
        assert learned.min() > 1.5 * others.max()
        assert learned.min() > 20 * others[-1].max()

    @pytest.mark.slow
    def test_a_parameter_that_depends_on_the_cell(self):
        """The best value is 2 c - 1 for a parent at c: a line in the cell, no fixed value."""

        def mutate(values, key, genotype, expert):
            x = genotype["x"]
            gain = 0.1 * jnp.exp(-10.0 * (values[0] - (2 * x[1] - 1)) ** 2) - 0.02
            return {**genotype, "x": jnp.stack([x[0] + gain, x[1]])}

        def only_archive_0(generation, batch_size, num_archives):
            return jnp.zeros(batch_size, jnp.int32)

        parts = parametric(keep_first), parametric(mutate, Parameter("c", -2.0, 0.0, 2.0))
        fixed = np.linspace(-1.0, 1.0, 9)[:, None]
        options = {"seeds": 6, "top": 1.0}
        learned, info, others = compare(*parts, only_archive_0, fixed, RandomSelector(), **options)
        assert learned.min() > 1.25 * others.max()
        # Some searches learn the line, others only a part of it in so short a time.
        found = []
        for values, scores in zip(info["parameters"][..., 0], info["parents"], strict=True):
            lines = zip(scores[:, :, 0, 1] - 0.5, values, strict=True)
            found.append(np.median([np.polyfit(x, y, 1) for x, y in lines], axis=0))
        slope, middle = np.median(found, axis=0)
        assert abs(slope - 2.0) < 1.0
        assert abs(middle) < 0.2


def merging():
    crossover = parametric_crossover(std=0.0)
    mutation = parametric_mutation(gaussian_mutation(1.0))
    return ControlledEmitter(EliteSelector(), crossover, mutation, BATCH, K)


def start(emitter, seed=0):
    algorithm = MAPElites(score, emitter, qd_metrics, CyclicRepertoire.init)
    first = {"x": jax.random.uniform(jax.random.key(seed), (16, K))}
    repertoire, state, _ = algorithm.init(first, GRID, jax.random.key(seed))
    return algorithm, repertoire, state


@pytest.mark.slow
def test_ask_tell_is_the_scanned_run_and_compiles_once():
    hot: tuple[Any, ...] = (breed, learn)
    for function in hot:
        function.clear_cache()
    for _ in range(2):
        algorithm, repertoire, state = start(merging())
        carry = repertoire, state, jax.random.key(1)
        for _ in range(6):
            carry, metrics = algorithm.scan_update(carry, None)
    assert [function._cache_size() for function in hot] == [1, 1]
    scanned, history = jax.jit(lambda c: jax.lax.scan(algorithm.scan_update, c, None, length=6))(
        (repertoire, state, jax.random.key(1))
    )
    np.testing.assert_allclose(history["qd_score"][-1], metrics["qd_score"], rtol=1e-4)
    np.testing.assert_allclose(scanned[1].cmaes.mean, carry[1].cmaes.mean, rtol=1e-3, atol=1e-4)
    assert isinstance(carry[1], ControlState)
    assert int(carry[1].generation) == 6
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, carry[1])]
    assert kinds[0] == kinds[1]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(carry[1]))


@pytest.mark.slow
def test_children_are_bred_with_the_values_they_report():
    emitter = merging()
    _, repertoire, state = start(emitter)
    children, info = emitter.emit(repertoire, state, jax.random.key(0))
    assert [p.name for p in emitter.parameters] == ["w1", "w2", "w_max"]
    weights, strength = info["parameters"][:, :2], info["parameters"][:, 2:]
    pair = repertoire.gather(info["parents"])["x"]
    share = weights / weights.sum(axis=1, keepdims=True)
    noise = np.asarray((children["x"] - (share[..., None] * pair).sum(axis=1)) / strength)
    # Standard normal numbers, 128 of them, if parents, weights and strengths are the right ones.
    assert abs(noise.mean()) < 0.5
    assert 0.7 < noise.std() < 1.3
    assert (info["archive"] == 0).all()


def test_features_are_the_centres_of_the_parents_cells():
    grid = make_grid([0.0, 10.0, -1.0], [1.0, 20.0, 1.0], 4)
    scores = jnp.asarray([[[0.3, 19.9, 0.9], [5.0, 10.1, -5.0]]] * 3)
    features = parent_features(grid, scores, jnp.arange(3))
    bins = np.asarray([[1, 3, 3], [3, 0, 0]])
    for k, row in enumerate(np.asarray(features)):
        centres = (np.delete(bins, k, axis=1) + 0.5) / 4
        np.testing.assert_allclose(row, [*centres.ravel(), 1.0], rtol=1e-6)


@pytest.mark.slow
def test_features_on_cells_that_are_no_grid():
    lower, upper = jnp.asarray([0.0, 10.0, -1.0]), jnp.asarray([1.0, 20.0, 1.0])
    centres = jax.random.uniform(jax.random.key(0), (3, 9, 2))
    cells = CVT(lower=lower, upper=upper, centres=centres)
    scores = jnp.asarray([[[0.3, 19.9, 0.9], [5.0, 10.1, -5.0]]])
    features = np.asarray(parent_features(cells, scores, jnp.asarray([1])))[0]
    nearest = cells.centroids(1)[cells.cell_of(scores[0], 1)]
    expected = (np.asarray(nearest) - [0.0, -1.0]) / [1.0, 2.0]
    np.testing.assert_allclose(features, [*expected.ravel(), 1.0], rtol=1e-5)


def test_features_of_a_task_without_range():
    grid = make_grid([0.0, 0.5], [1.0, 0.5], 2)
    features = parent_features(grid, jnp.full((2, 2, 2), 0.5), jnp.arange(2))
    assert np.isfinite(np.asarray(features)).all()


@pytest.mark.slow
def test_beside_a_qdax_emitter_in_a_multi_emitter():
    """Second in line, where QDax slices another emitter's rows out of our extra scores."""
    iso_line = partial(isoline_variation, iso_sigma=0.05, line_sigma=0.1)
    emitter = MultiEmitter((MixingEmitter(lambda x, k: x, iso_line, 1.0, 8), merging()))
    algorithm, repertoire, state = start(emitter)
    carry = repertoire, state, jax.random.key(2)
    for _ in range(2):
        carry, _ = algorithm.scan_update(carry, None)
    control = carry[1].emitter_states[1]
    assert int(control.generation) == 2
    np.testing.assert_array_equal(control.cmaes.num_updates, [1, 1])


def test_a_single_elite_and_two_runs_alike():
    emitter = merging()
    first = {"x": jnp.full((1, K), 0.3)}
    repertoire = CyclicRepertoire.init(first, first["x"], first["x"], GRID)
    state = emitter.init(jax.random.key(0), repertoire, first, first["x"], first["x"], {})
    one, same, other = (
        np.asarray(emitter.emit(repertoire, state, jax.random.key(s))[0]["x"]) for s in (0, 0, 1)
    )
    assert np.isfinite(one).all()
    np.testing.assert_array_equal(one, same)
    assert not np.intersect1d(one, other).size


class TestBadInput:
    def test_an_operator_without_parameters_of_its_own(self):
        wrong: Any = linear_crossover()
        with pytest.raises((ValueError, TypeError), match="Parametric"):
            ControlledEmitter(EliteSelector(), wrong, parametric(keep), BATCH, K)

    def test_nothing_to_control(self):
        with pytest.raises(ValueError, match="at least one parameter to control"):
            ControlledEmitter(EliteSelector(), parametric(keep_first), parametric(keep), BATCH, K)

    def test_another_number_of_archives(self):
        scores = jnp.ones((2, 3))
        repertoire = CyclicRepertoire.init(
            {"x": scores}, scores, scores, make_grid([0.0] * 3, [1.0] * 3, 2)
        )
        with pytest.raises(ValueError, match="made for 2 archives, the repertoire has 3"):
            merging().init(jax.random.key(0), repertoire, None, None, None, {})

    def test_archives_without_cells(self):
        scores = jnp.ones((2, 2))
        novelty = make_dominated_novelty(2, 4)
        repertoire = DominatedNoveltyRepertoire.init({"x": scores}, scores, scores, novelty)
        with pytest.raises(ValueError, match=r"archives with cells.*found DominatedNovelty"):
            merging().init(jax.random.key(0), repertoire, None, None, None, {})
