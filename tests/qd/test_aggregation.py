import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.qd.aggregation import aggregate, best_elites, softmax_weights
from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.repertoire import CyclicRepertoire


def test_weights_are_the_softmax():
    quality = np.asarray([0.2, 0.9, 0.4])
    expected = np.exp(quality / 0.3) / np.exp(quality / 0.3).sum()
    np.testing.assert_allclose(softmax_weights(jnp.asarray(quality), 0.3), expected, rtol=1e-5)


def test_a_cold_temperature_picks_the_best():
    weights = softmax_weights(jnp.asarray([0.2, 0.9, 0.4]), 1e-4)
    np.testing.assert_allclose(weights, [0.0, 1.0, 0.0], atol=1e-6)


def test_aggregate_mixes_every_leaf_and_keeps_dtypes():
    genotypes = {"a": jnp.asarray([[1.0, 2.0], [3.0, 6.0]]), "b": jnp.ones((2, 1), jnp.bfloat16)}
    mixed = aggregate(genotypes, jnp.asarray([0.5, 0.5]))
    np.testing.assert_allclose(mixed["a"], [2.0, 4.0])
    assert mixed["b"].dtype == jnp.bfloat16


def test_best_elites_break_ties_by_the_mean_score():
    scores = jnp.asarray([[0.9, 0.1, 0.2], [0.9, 0.6, 0.5], [0.3, 0.8, 0.1], [0.2, 0.1, 0.7]])
    genotypes = {"id": jnp.arange(4, dtype=jnp.int32)}
    grid = make_grid([0.0] * 3, [1.0] * 3, 5)
    repertoire = CyclicRepertoire.init(genotypes, scores, scores, grid)
    best = repertoire.gather(best_elites(repertoire))
    np.testing.assert_array_equal(best["id"], [1, 2, 3])


@dataclasses.dataclass
class Table:
    """Not one of our repertoires, but it has scores and cells."""

    scores: Any
    cells: Any


NEG = -np.inf


@pytest.mark.parametrize("tasks", range(2, 11))
def test_best_elites_of_any_table_are_those_a_loop_finds(tasks):
    rng = np.random.default_rng(tasks)
    # Few values, so that there are ties of quality and of means.
    scores = rng.choice([0.0, 0.25, 0.5], size=(9, tasks)).astype(np.float32)
    scores[0] = NEG
    cells = rng.integers(-1, 9, size=(tasks, 12)).astype(np.int32)
    cells[-1] = -1
    found = best_elites(Table(jnp.asarray(scores), jnp.asarray(cells)))
    assert found.dtype == jnp.int32
    for k in range(tasks):
        expected, key = -1, None
        for index in cells[k]:
            rival = (scores[index, k], scores[index].mean())
            if index >= 0 and (key is None or rival > key):
                expected, key = index, rival
        assert int(found[k]) == expected


def test_an_empty_archive_has_no_best_elite_and_one_of_quality_minus_infinity_is_found():
    scores = jnp.asarray([[9.0, 9.0], [NEG, 0.5], [NEG, 0.7]])
    cells = jnp.asarray([[-1, -1, -1], [-1, 1, -1]])
    np.testing.assert_array_equal(best_elites(Table(scores, cells)), [-1, 1])
    cells = jnp.asarray([[-1, 1, 2], [-1, -1, 2]])
    np.testing.assert_array_equal(best_elites(Table(scores, cells)), [1, 2])


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45])
def test_the_coldest_temperatures_share_between_the_best(temperature):
    for weights in (softmax_weights, jax.jit(softmax_weights)):
        found = weights(jnp.asarray([0.9, 0.2, 0.9, NEG]), temperature)
        np.testing.assert_allclose(found, [0.5, 0.0, 0.5, 0.0], atol=1e-6)


@pytest.mark.parametrize("tasks", range(2, 11))
def test_a_hot_temperature_weights_all_alike(tasks):
    weights = softmax_weights(jnp.linspace(-3, 3, tasks), 1e6)
    np.testing.assert_allclose(weights, np.full(tasks, 1 / tasks), atol=1e-5)


def test_an_empty_archive_adds_nothing_whatever_stands_in_its_row():
    genotypes = {"a": jnp.asarray([[1.0], [np.nan], [3.0]])}
    mixed = aggregate(genotypes, jnp.asarray([0.5, NEG, 0.5]))
    np.testing.assert_allclose(mixed["a"], [2.0])


@pytest.mark.parametrize("quality", [[NEG, NEG], [0.5, np.nan], [0.5, np.inf]])
def test_qualities_that_weigh_nothing(quality):
    with pytest.raises(ValueError, match="expected finite numbers, or -inf for an empty"):
        softmax_weights(jnp.asarray(quality))


def test_rows_must_match():
    with pytest.raises(ValueError, match=r"3 rows, one a quality, found shape \(2, 1\)"):
        aggregate({"a": jnp.ones((2, 1))}, jnp.ones(3))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="must be positive"):
        softmax_weights(jnp.ones(2), temperature)
