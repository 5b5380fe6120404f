import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.child_svd import child_svd_mutation
from cycleqd_jax.merging.layout import GainLayout, LeafLayout
from cycleqd_jax.merging.spectral import decompose, expand, expert_gains

ROLES = {"m": "matrix", "s": "vector", "v": "vector"}
LEAVES = (LeafLayout("matrix", (2,), (3, 0, 5)), LeafLayout("vector", (), (1, 1, 1)))
LAYOUT = GainLayout(jax.tree.structure({"m": 0, "v": 0}), LEAVES)
apply = jax.jit(lambda operator, *args: operator(*args))


def child_of(shape=(3, 6, 5), seed=0):
    rng = np.random.default_rng(seed)
    return {
        "m": rng.normal(size=shape).astype(np.float32),
        "s": rng.normal(size=(3, 5)).astype(np.float32),
        "v": np.ones(4, np.float32),
    }


@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 5, 6), (4, 4)])
def test_dense_scales_each_layers_own_singular_values(shape):
    """Each direction is scaled by one number out of [0, w_max], by NumPy's SVD in float64."""
    tau = child_of(shape)
    child = apply(
        child_svd_mutation(ROLES, 1.5, space="dense"), jax.random.key(1), tau, jnp.int32(0)
    )
    left, values, right = np.linalg.svd(tau["m"].astype(np.float64), full_matrices=False)
    inner = np.swapaxes(left, -1, -2) @ np.asarray(child["m"], np.float64)
    inner = inner @ np.swapaxes(right, -1, -2)
    scales = np.diagonal(inner, axis1=-2, axis2=-1) / values
    rest = inner - np.eye(inner.shape[-1]) * inner
    assert np.abs(rest).max() < 1e-5
    assert ((scales > 0) & (scales < 1.5)).all()
    assert np.unique(scales).size == scales.size
    rebuilt = (left * (values * scales)[..., None, :]) @ right
    np.testing.assert_allclose(child["m"], rebuilt, atol=1e-5)


def test_dense_scales_fill_the_range():
    tau = {"m": np.tile(np.diag([3.0, 2.0, 1.0]).astype(np.float32), (700, 1, 1))}
    child = child_svd_mutation({"m": "matrix"}, 2.0, space="dense")(jax.random.key(0), tau, 0)
    scales = np.diagonal(child["m"], axis1=1, axis2=2) / np.asarray([3.0, 2.0, 1.0])
    assert scales.mean() == pytest.approx(1.0, abs=0.05)
    assert scales.min() < 0.01
    assert scales.max() > 1.99


def test_zero_and_rank_one_matrices_are_legal():
    tau = child_of()
    tau["m"] = np.zeros_like(tau["m"])
    tau["m"][1] = np.outer(np.arange(6), np.ones(5))
    child = apply(child_svd_mutation(ROLES, space="dense"), jax.random.key(0), tau, jnp.int32(0))
    assert not np.asarray(child["m"][0]).any()
    scale = np.asarray(child["m"][1])[1, 0]
    np.testing.assert_allclose(child["m"][1], scale * tau["m"][1], atol=1e-5)


def test_spectral_scales_gains_and_leaves_vectors_alone():
    gains = LAYOUT.full(1.0)
    child = child_svd_mutation(LAYOUT, 2.0)(jax.random.key(0), gains, jnp.int32(0))
    assert ((np.asarray(child["m"]) >= 0) & (np.asarray(child["m"]) <= 2)).all()
    assert np.unique(child["m"]).size == child["m"].size
    np.testing.assert_array_equal(child["v"], [1.0, 1.0, 1.0])


def test_the_spaces_agree_on_a_child_of_one_expert():
    """A spectral child keeps the expert's singular directions, scaled, as the dense one does."""
    tau = child_of()
    basis, _ = decompose([tau, child_of(seed=1)], ROLES)
    gains = child_svd_mutation(basis, 2.0)(jax.random.key(0), expert_gains(basis, 0), jnp.int32(0))
    left, values, right = np.linalg.svd(tau["m"].astype(np.float64), full_matrices=False)
    scales = np.asarray(gains["m"], np.float64)[..., :5]
    rebuilt = (left * (values * scales)[..., None, :]) @ right
    np.testing.assert_allclose(expand(basis, gains)["m"], rebuilt, atol=1e-5)


def test_a_strength_of_zero_removes_the_task_vector_of_matrices():
    child = apply(
        child_svd_mutation(ROLES, 0.0, space="dense"), jax.random.key(0), child_of(), jnp.int32(0)
    )
    assert not np.asarray(child["m"]).any()


def test_bad_input():
    with pytest.raises(ValueError, match=r"w_max must not be negative, found -0\.1"):
        child_svd_mutation(LAYOUT, -0.1)
    with pytest.raises(ValueError, match="space 'spectral' needs a basis or its GainLayout"):
        child_svd_mutation(ROLES)
