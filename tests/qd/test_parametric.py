from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.crossover import linear_crossover
from cycleqd_jax.merging.expert_svd import expert_svd_mutation
from cycleqd_jax.merging.layout import GainLayout, LeafLayout
from cycleqd_jax.merging.mutation import gaussian_mutation
from cycleqd_jax.qd.parametric import (
    Parameter,
    parametric,
    parametric_crossover,
    parametric_mutation,
    squash,
)

LAYOUT = GainLayout(jax.tree.structure({"x": 0}), (LeafLayout("matrix", (), (2, 1, 2)),))
KEY = jax.random.key(3)


def tree(seed, dtype=jnp.float32):
    return {"x": jax.random.normal(jax.random.key(seed), (5,)).astype(dtype)}


def test_crossover_is_the_linear_one_with_those_means():
    a, b = tree(0), tree(1)
    merge = parametric_crossover(std=0.2)
    assert [p.name for p in merge.parameters] == ["w1", "w2"]
    same = merge(jnp.asarray([1.0, 1.0]), KEY, a, b)
    np.testing.assert_allclose(same["x"], linear_crossover(1.0, 0.2)(KEY, a, b)["x"], rtol=1e-6)
    child = parametric_crossover(std=0.0)(jnp.asarray([1.5, -0.5]), KEY, a, b)
    np.testing.assert_allclose(child["x"], 1.5 * a["x"] - 0.5 * b["x"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("unit", "same"),
    [
        (gaussian_mutation(1.0), gaussian_mutation(0.25)),
        (expert_svd_mutation(LAYOUT, 1.0), expert_svd_mutation(LAYOUT, 0.25)),
    ],
)
def test_mutation_is_the_one_of_that_strength(unit, same):
    expert = jnp.int32(2)
    found = parametric_mutation(unit)(jnp.asarray([0.25]), KEY, tree(0), expert)
    np.testing.assert_allclose(found["x"], same(KEY, tree(0), expert)["x"], rtol=1e-5, atol=1e-6)


def test_dtype_is_kept():
    a, b = tree(0, jnp.bfloat16), tree(1, jnp.bfloat16)
    child = parametric_crossover()(jnp.asarray([1.0, 2.0]), KEY, a, b)
    child = parametric_mutation(gaussian_mutation(1.0))(jnp.asarray([0.1]), KEY, child, 0)
    assert child["x"].dtype == jnp.bfloat16


def test_squash_starts_at_start_and_stays_inside():
    parameters = (Parameter("w1", -1.0, 1.0, 3.0), Parameter("w_max", 0.0, 0.1, 0.5))
    outputs = jnp.asarray([[0.0, 0.0], [-50.0, -50.0], [50.0, 50.0], [1.0, -1.0]])
    values = np.asarray(squash(outputs, parameters))
    np.testing.assert_allclose(values[0], [1.0, 0.1], rtol=1e-6)
    np.testing.assert_allclose(values[1], [-1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(values[2], [3.0, 0.5], rtol=1e-6)
    assert values[3, 0] > 1.0
    assert 0.0 < values[3, 1] < 0.1


def test_equal_operators_are_equal_to_the_compiler():
    merge: Any = jax.jit(lambda operator, values: operator(values, KEY, tree(0), tree(1)))
    for _ in range(2):
        merge(parametric_crossover(0.1), jnp.ones(2))
    assert merge._cache_size() == 1


@pytest.mark.parametrize("ends", [(0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 0.5, 0.0)])
def test_ends_out_of_order(ends):
    with pytest.raises(ValueError, match="'share': expected low < start < high"):
        Parameter("share", *ends)


def test_wrong_std():
    with pytest.raises(ValueError, match="must not be negative"):
        parametric_crossover(-0.1)


def test_no_parameters():
    keep = parametric(lambda values, key, a, b: a)
    assert keep.parameters == ()
    np.testing.assert_array_equal(keep(jnp.zeros(0), KEY, tree(0), tree(1))["x"], tree(0)["x"])
