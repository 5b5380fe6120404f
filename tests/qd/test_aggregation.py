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


def test_rows_must_match():
    with pytest.raises(ValueError, match=r"3 rows, one a quality, found shape \(2, 1\)"):
        aggregate({"a": jnp.ones((2, 1))}, jnp.ones(3))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="must be positive"):
        softmax_weights(jnp.ones(2), temperature)
