from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.core.map_elites import MAPElites

from cycleqd_jax.qd.adaptive_sampling import AdaptiveMAPElites
from cycleqd_jax.qd.aggregation import best_elites
from cycleqd_jax.qd.emitter import CycleQDEmitter
from cycleqd_jax.qd.evidence import SampleNoise, sample_noise
from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.metrics import qd_metrics
from cycleqd_jax.qd.noise import NoisyRepertoire
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.qd.selection import EliteSelector

SPREAD, EXPERTS, CHILDREN, AGAIN = 0.2, 16, 16, 8
SUMMITS = jnp.asarray([[0.8, 0.2], [0.2, 0.8]])
GRID = make_grid([0.0, 0.0], [1.0, 1.0], 5)


def true_scores(genotypes):
    """One minus the squared distance to each skill's summit: 1 at best."""
    return 1 - jnp.sum((genotypes[:, None] - SUMMITS) ** 2, axis=-1)


def score(genotypes, key, spread=SPREAD):
    scores = true_scores(genotypes)
    scores = scores + spread * jax.random.normal(key, scores.shape)
    return scores, scores, {"drawn": scores}


def crossover(key, a, b):
    return a + jax.random.uniform(key, ()) * (b - a)


def mutation(key, genotype, expert):
    return jnp.clip(genotype + 0.1 * jax.random.normal(key, genotype.shape), 0, 1)


def emitter(children):
    return CycleQDEmitter(EliteSelector(), crossover, mutation, children, 2)


def make(noise):
    return partial(NoisyRepertoire.init, noise=noise, confidence=0.95)


def outcome(algorithm, generations, key):
    """Final repertoire, what its best elites claim, and what is true of them."""
    init_key, loop_key = jax.random.split(key)
    genotypes = jax.random.uniform(init_key, (EXPERTS, 2))
    repertoire, state, _ = algorithm.init(genotypes, GRID, init_key)
    # A loop with a traced end, so that all tests share one compilation.
    repertoire = jax.lax.fori_loop(
        0,
        generations,
        lambda _, carry: algorithm.scan_update(carry, None)[0],
        (repertoire, state, loop_key),
    )[0]
    best, tasks = best_elites(repertoire), jnp.arange(2)
    claimed = repertoire.scores[best, tasks]
    return repertoire, claimed, true_scores(repertoire.gather(best))[tasks, tasks]


@jax.jit
@partial(jax.vmap, in_axes=(0, None, None))
def plain(key, spread, generations):
    algorithm = MAPElites(
        partial(score, spread=spread), emitter(CHILDREN), qd_metrics, CyclicRepertoire.init
    )
    return outcome(algorithm, generations, key)


@jax.jit
@partial(jax.vmap, in_axes=(0, None, None))
def noisy(key, spread, generations):
    algorithm = AdaptiveMAPElites(
        partial(score, spread=spread),
        emitter(CHILDREN),
        qd_metrics,
        make(SampleNoise(prior_variance=spread**2, prior_count=jnp.float32(4.0))),
        reevaluations=AGAIN,
    )
    return outcome(algorithm, generations, key)


KEYS = jax.random.split(jax.random.key(0), 6)


@pytest.mark.slow
def test_the_best_is_overestimated_far_less_for_the_same_evaluations():
    _, claimed, true = plain(KEYS, SPREAD, 225)
    plain_excess = float(jnp.mean(claimed - true))
    found, claimed, noisy_true = noisy(KEYS, SPREAD, 225 * CHILDREN // (CHILDREN + AGAIN))
    noisy_excess = float(jnp.mean(claimed - noisy_true))
    assert plain_excess > 3 * SPREAD
    assert noisy_excess < plain_excess / 2
    # The lower claim is not bought with worse elites.
    assert float(jnp.mean(noisy_true)) > float(jnp.mean(true)) - 0.02
    assert int(found.evidence.count.max()) > 10


@pytest.mark.slow
def test_without_noise_the_archives_are_those_of_plain_map_elites():
    expected, _, _ = plain(KEYS, 0.0, 40)
    found, _, _ = noisy(KEYS, 0.0, 40)
    for field in ("genotypes", "scores", "cells"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    compiled: list[Any] = [plain, noisy]
    assert [function._cache_size() for function in compiled] == [1, 1]


def test_every_evaluation_is_an_independent_draw():
    algorithm = AdaptiveMAPElites(
        score,
        emitter(CHILDREN),
        qd_metrics,
        partial(make(sample_noise(SPREAD**2)), keys_extra_scores=("drawn",)),
        reevaluations=AGAIN,
        evaluations=3,
    )
    genotypes = jax.random.uniform(jax.random.key(2), (EXPERTS, 2))
    repertoire, _, _ = algorithm.init(genotypes, GRID, jax.random.key(3))
    occupied = np.asarray(repertoire.occupied)
    np.testing.assert_array_equal(repertoire.evidence.count[occupied], 3)
    assert (np.asarray(repertoire.evidence.m2)[occupied] > 0).all()
    # Extra scores are the first evaluation's, not the mean.
    assert (np.asarray(repertoire.extra_scores["drawn"] - repertoire.scores)[occupied] != 0).all()


def test_an_unmodified_map_elites_asks_and_tells_it():
    algorithm = MAPElites(score, emitter(CHILDREN), qd_metrics, make(sample_noise(SPREAD**2)))
    genotypes = jax.random.uniform(jax.random.key(4), (EXPERTS, 2))
    repertoire, state, _ = algorithm.init(genotypes, GRID, jax.random.key(5))
    scores = jnp.full((EXPERTS, 2), 5.0)
    repertoire, state, metrics = algorithm.tell(genotypes, scores, scores, repertoire, state)
    np.testing.assert_array_equal(metrics["best"], [5.0, 5.0])
    occupied = np.asarray(repertoire.occupied)
    np.testing.assert_array_equal(repertoire.evidence.count[occupied], 1)
    assert int(state.generation) == 1


@pytest.mark.parametrize("name", ["reevaluations", "evaluations"])
def test_numbers_of_evaluations_must_be_positive(name):
    options = {"reevaluations": 1, "evaluations": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, found 0"):
        AdaptiveMAPElites(score, emitter(CHILDREN), qd_metrics, make(sample_noise(0.1)), **options)
