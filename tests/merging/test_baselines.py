import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.baselines import task_arithmetic


def test_adds_the_scaled_sum(family):
    merged = task_arithmetic(family.base, family.task_vectors, 0.3)
    for b, m, *t in zip(
        *(jax.tree.leaves(x) for x in (family.base, merged, *family.task_vectors)), strict=True
    ):
        np.testing.assert_allclose(m, b + 0.3 * sum(t), rtol=1e-5, atol=1e-6)


def test_keeps_the_dtype():
    base = {"w": jnp.ones(2, jnp.bfloat16)}
    assert task_arithmetic(base, [{"w": jnp.ones(2)}], 1.0)["w"].dtype == jnp.bfloat16


def test_needs_a_task_vector():
    with pytest.raises(ValueError, match="found none"):
        task_arithmetic({"w": jnp.ones(2)}, [], 1.0)


def test_names_the_leaf_that_differs():
    with pytest.raises(ValueError, match=r"leaf 'w'.*task vector 1"):
        task_arithmetic({"w": jnp.ones(2)}, [{"w": jnp.ones(2)}, {"w": jnp.ones(3)}], 1.0)
