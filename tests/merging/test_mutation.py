import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.mutation import add_increment, gaussian_mutation, no_mutation

TREE = {"a": jnp.zeros((50, 80)), "b": jnp.zeros(4000)}


def test_gaussian_has_the_asked_for_spread_on_every_leaf():
    out = gaussian_mutation(0.5)(jax.random.key(0), TREE, jnp.int32(0))
    for leaf in jax.tree.leaves(out):
        assert np.std(leaf) == pytest.approx(0.5, rel=0.05)
    assert not np.array_equal(np.ravel(out["a"]), out["b"])


def test_no_mutation_returns_the_genotype():
    jax.tree.map(np.testing.assert_array_equal, no_mutation()(jax.random.key(0), TREE, 0), TREE)


def test_an_increment_is_added_before_rounding():
    genotype = {"a": jnp.asarray([1.0], jnp.bfloat16)}
    small = add_increment(genotype, {"a": jnp.asarray([0.006])})
    assert small["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(small["a"], np.float32), [1.0078125])


def test_negative_strength_is_refused():
    with pytest.raises(ValueError, match=r"sigma must not be negative, found -0\.1"):
        gaussian_mutation(-0.1)
