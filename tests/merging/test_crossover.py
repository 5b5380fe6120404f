import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.crossover import linear_crossover

A = {"x": jnp.asarray([1.0, 2.0]), "y": jnp.asarray([[3.0]])}
B = {"x": jnp.asarray([-1.0, 5.0]), "y": jnp.asarray([[7.0]])}


@pytest.mark.parametrize("seed", range(5))
def test_is_the_normalised_sum_with_one_pair_of_weights(seed):
    key = jax.random.key(seed)
    w = 1.0 + 0.5 * np.asarray(jax.random.normal(key, (2,), jnp.float32), np.float64)
    child = linear_crossover(1.0, 0.5)(key, A, B)
    for name, first in A.items():
        expected = (w[0] * np.asarray(first) + w[1] * np.asarray(B[name])) / w.sum()
        np.testing.assert_allclose(child[name], expected, rtol=2e-6)


def test_without_spread_it_is_the_mean():
    child = linear_crossover(1.0, 0.0)(jax.random.key(0), A, B)
    np.testing.assert_allclose(child["x"], [0.0, 3.5])


def test_weights_that_cancel_give_the_mean():
    child = linear_crossover(0.0, 0.0)(jax.random.key(0), A, B)
    np.testing.assert_array_equal(child["x"], [0.0, 3.5])
    child = linear_crossover(0.0, 1e-8)(jax.random.key(1), A, B)
    np.testing.assert_array_equal(child["y"], [[5.0]])


def test_negative_weights_reach_beyond_the_parents():
    crossover = linear_crossover(0.0, 1.0)
    keys = jax.random.split(jax.random.key(3), 64)
    children = jax.vmap(crossover, in_axes=(0, None, None))(keys, A, B)["y"]
    assert (np.asarray(children) > 7.0).any()
    assert (np.asarray(children) < 3.0).any()


def test_identical_parents_have_an_identical_child():
    child = linear_crossover()(jax.random.key(0), A, A)
    np.testing.assert_allclose(child["x"], A["x"], rtol=1e-6)


def test_negative_spread_is_refused():
    with pytest.raises(ValueError, match="must not be negative, found -1"):
        linear_crossover(1.0, -1.0)
