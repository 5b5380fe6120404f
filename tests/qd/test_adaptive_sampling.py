from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.core.map_elites import MAPElites

from cycleqd_jax.qd.adaptive_sampling import AdaptiveMAPElites
from cycleqd_jax.qd.aggregation import best_elites
from cycleqd_jax.qd.emitter import CycleQDEmitter
from cycleqd_jax.qd.evidence import sample_noise
from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.metrics import qd_metrics
from cycleqd_jax.qd.noise import NoisyRepertoire
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.qd.selection import EliteSelector

SPREAD, EXPERTS = 0.2, 16
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


def adaptive(children, again, noise, *, scoring=score, confidence=0.95, **options):
    make = partial(
        NoisyRepertoire.init, noise=noise, confidence=confidence, keys_extra_scores=("drawn",)
    )
    return AdaptiveMAPElites(
        scoring, emitter(children), qd_metrics, make, reevaluations=again, **options
    )


def final(algorithm, generations, key):
    init_key, loop_key = jax.random.split(key)
    genotypes = jax.random.uniform(init_key, (EXPERTS, 2))
    repertoire, state, _ = algorithm.init(genotypes, GRID, init_key)
    carry, _ = jax.lax.scan(
        algorithm.scan_update, (repertoire, state, loop_key), None, length=generations
    )
    return carry[0]


def claims(repertoire):
    """What the archives' best elites claim, and what is true of them."""
    best, tasks = best_elites(repertoire), jnp.arange(2)
    return repertoire.scores[best, tasks], true_scores(repertoire.gather(best))[tasks, tasks]


def test_the_best_is_overestimated_far_less_for_the_same_evaluations():
    keys = jax.random.split(jax.random.key(0), 6)
    plain = MAPElites(score, emitter(24), qd_metrics, CyclicRepertoire.init)
    noisy = adaptive(16, 8, sample_noise(SPREAD**2))
    claimed, true = jax.jit(jax.vmap(lambda k: claims(final(plain, 150, k))))(keys)
    plain_excess = float(jnp.mean(claimed - true))
    claimed, noisy_true = jax.jit(jax.vmap(lambda k: claims(final(noisy, 150, k))))(keys)
    noisy_excess = float(jnp.mean(claimed - noisy_true))
    assert plain_excess > 3 * SPREAD
    assert noisy_excess < plain_excess / 2
    # The lower claim is not bought with worse elites.
    assert float(jnp.mean(noisy_true)) > float(jnp.mean(true)) - 0.02


def test_without_noise_the_archives_are_those_of_plain_map_elites():
    exact = partial(score, spread=0.0)
    plain = MAPElites(exact, emitter(8), qd_metrics, CyclicRepertoire.init)
    noisy = adaptive(8, 4, sample_noise(0.0), scoring=exact, evaluations=3)
    expected = jax.jit(lambda k: final(plain, 40, k))(jax.random.key(1))
    found = jax.jit(lambda k: final(noisy, 40, k))(jax.random.key(1))
    for field in ("genotypes", "scores", "cells"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    assert (np.asarray(found.evidence.count)[np.asarray(found.occupied)] >= 3).all()


def test_every_evaluation_is_an_independent_draw_and_is_counted():
    noisy = adaptive(8, 4, sample_noise(SPREAD**2), evaluations=3)
    repertoire, state, _ = noisy.init(
        jax.random.uniform(jax.random.key(2), (EXPERTS, 2)), GRID, jax.random.key(3)
    )
    occupied = np.asarray(repertoire.occupied)
    np.testing.assert_array_equal(repertoire.evidence.count[occupied], 3)
    assert (np.asarray(repertoire.evidence.m2)[occupied] > 0).all()
    # Extra scores are the first evaluation's, not the mean.
    assert (np.asarray(repertoire.extra_scores["drawn"] - repertoire.scores)[occupied] != 0).all()
    update = jax.jit(noisy.update)
    for seed in range(6):
        repertoire, state, metrics = update(repertoire, state, jax.random.key(seed))
    counts = np.asarray(repertoire.evidence.count)[np.asarray(repertoire.occupied)]
    assert set(np.unique(counts)) > {3}
    assert counts.max() <= 3 + 6
    assert metrics["coverage"].shape == (2,)


def test_it_works_inside_an_unmodified_map_elites_too():
    make = partial(NoisyRepertoire.init, noise=sample_noise(SPREAD**2))
    algorithm = MAPElites(score, emitter(8), qd_metrics, make)
    repertoire = jax.jit(lambda k: final(algorithm, 10, k))(jax.random.key(4))
    np.testing.assert_array_equal(
        np.asarray(repertoire.evidence.count)[np.asarray(repertoire.occupied)], 1
    )


@pytest.mark.parametrize("name", ["reevaluations", "evaluations"])
def test_numbers_of_evaluations_must_be_positive(name):
    options = {"reevaluations": 1, "evaluations": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, found 0"):
        AdaptiveMAPElites(score, emitter(8), qd_metrics, NoisyRepertoire.init, **options)
