"""Properties that every crossover and every mutation must have, over a registry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.crossover import linear_crossover
from cycleqd_jax.merging.layout import GainLayout, LeafLayout
from cycleqd_jax.merging.mutation import (
    expert_svd_mutation,
    gain_scaling_mutation,
    gaussian_mutation,
    no_mutation,
)
from cycleqd_jax.merging.spectral import decompose, expand, zero_gains
from cycleqd_jax.merging.task_vector import check_same_tree

LAYOUT = GainLayout(
    jax.tree.structure({"m": 0, "n": 0, "v": 0}),
    (
        LeafLayout("matrix", (2,), (3, 1, 2)),
        LeafLayout("matrix", (), (4, 4, 0)),
        LeafLayout("vector", (2,), (1, 1, 1)),
    ),
)
TAUS = [
    {
        "m": np.random.default_rng(e).normal(size=(2, 5, 4)).astype(np.float32),
        "n": np.random.default_rng(e).normal(size=(3, 6)).astype(np.float32),
        "v": np.ones(4, np.float32),
    }
    for e in range(3)
]
BASIS, _ = decompose(TAUS, {"m": "matrix", "n": "matrix", "v": "vector"})


def random_like(tree, seed, dtype):
    leaves = jax.tree.leaves(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [jax.random.normal(k, x.shape).astype(dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(tree), new)


def as_operator(crossover):
    """A crossover with a fixed second parent has a mutation's signature."""

    def operate(key, genotype, expert):
        return crossover(key, genotype, jax.tree.map(lambda x: -x, genotype))

    return operate


GAINS, DENSE = LAYOUT.zeros(), expand(BASIS, zero_gains(BASIS))
REGISTRY = {
    "linear_crossover": (as_operator(linear_crossover(1.0, 0.3)), GAINS),
    "expert_svd_spectral": (expert_svd_mutation(LAYOUT, 0.1), GAINS),
    "expert_svd_dense": (expert_svd_mutation(BASIS, 0.1, space="dense"), DENSE),
    "gain_scaling": (gain_scaling_mutation(LAYOUT, 2.0), GAINS),
    "gaussian": (gaussian_mutation(0.1), GAINS),
    "none": (no_mutation(), GAINS),
}
KEYS = jax.random.split(jax.random.key(11), 4)


def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", REGISTRY)
def test_every_operator(name, dtype):
    eager, like = REGISTRY[name]
    operator = jax.jit(eager)
    parent = random_like(like, 3, dtype)
    before = jax.tree.map(np.array, parent)
    child = operator(KEYS[0], parent, jnp.int32(1))

    check_same_tree(parent, child)
    for x, y in zip(jax.tree.leaves(child), jax.tree.leaves(parent), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.isfinite(np.asarray(x, np.float32)).all()
    assert equal(parent, before)
    assert equal(child, operator(KEYS[0], parent, jnp.int32(1)))
    assert equal(child, operator(KEYS[1], parent, jnp.int32(1))) == (name == "none")
    if dtype == jnp.float32:
        close(child, eager(KEYS[0], parent, jnp.int32(1)), 1e-6)


@pytest.mark.parametrize("name", REGISTRY)
def test_vmap_equals_a_loop(name):
    operator, like = REGISTRY[name]
    parents = [random_like(like, s, jnp.float32) for s in range(4)]
    experts = jnp.asarray([0, 1, 2, 1], jnp.int32)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parents)
    together = jax.jit(jax.vmap(operator))(KEYS, stacked, experts)
    one = jax.jit(operator)
    for i in range(4):
        alone = one(KEYS[i], parents[i], experts[i])
        close(jax.tree.map(lambda x, i=i: x[i], together), alone, 1e-5)
