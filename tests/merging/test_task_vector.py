import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.task_vector import (
    apply_task_vector,
    check_same_structure,
    check_same_tree,
    leaf_paths,
    task_vector,
)


def test_apply_undoes_the_difference(family):
    tau = task_vector(family.experts[0], family.base)
    rebuilt = apply_task_vector(family.base, tau)
    for a, b in zip(jax.tree.leaves(rebuilt), jax.tree.leaves(family.experts[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_bfloat16_weights_are_subtracted_in_float32():
    theta = {"w": jnp.asarray([1.0078125, 2.0], jnp.bfloat16)}
    base = {"w": jnp.asarray([1.0, -3.0], jnp.bfloat16)}
    tau = task_vector(theta, base)
    assert tau["w"].dtype == jnp.float32
    np.testing.assert_array_equal(tau["w"], [0.0078125, 5.0])
    rebuilt = apply_task_vector(base, tau, 1.0)
    assert rebuilt["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(rebuilt["w"], theta["w"])


def test_scale_multiplies_the_task_vector():
    out = apply_task_vector({"w": jnp.ones(2)}, {"w": jnp.asarray([2.0, 4.0])}, 0.5)
    np.testing.assert_array_equal(out["w"], [2.0, 3.0])


def test_leaf_paths_follow_the_flattening_order(family):
    assert leaf_paths(family.base) == [
        "embed",
        "layers/down",
        "layers/scale",
        "layers/up",
        "norm",
    ]
    assert leaf_paths(jnp.ones(2)) == ["."]


def test_a_missing_leaf_is_named():
    with pytest.raises(ValueError, match=r"leaf 'a/w' of the base is missing in the expert"):
        task_vector({"a": {"v": jnp.ones(1)}}, {"a": {"w": jnp.ones(1), "v": jnp.ones(1)}})


def test_an_extra_leaf_is_named():
    with pytest.raises(ValueError, match=r"leaf 'b' of the expert is not expected"):
        task_vector({"a": jnp.ones(1), "b": jnp.ones(1)}, {"a": jnp.ones(1)})


def test_a_misshapen_leaf_is_named_with_both_shapes():
    with pytest.raises(ValueError, match=r"leaf 'a': expected shape \(3,\).*found \(2,\)"):
        check_same_tree({"a": np.ones(3)}, {"a": np.ones(2)})


def test_other_containers_are_refused():
    with pytest.raises(ValueError, match="different containers"):
        check_same_structure([np.ones(1)], (np.ones(1),))
