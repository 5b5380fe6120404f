import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.layout import GainLayout, LeafLayout
from cycleqd_jax.merging.singular_values import singular_value_mutation

ROLES = {"m": "matrix", "v": "vector"}
LEAVES = (LeafLayout("matrix", (2,), (3, 0, 5)), LeafLayout("vector", (), (1, 1, 1)))
LAYOUT = GainLayout(jax.tree.structure({"m": 0, "v": 0}), LEAVES)
apply = jax.jit(lambda operator, *args: operator(*args))


def model(seed, scale, shape=(3, 6, 5)):
    rng = np.random.default_rng(seed)
    return {
        "m": (scale * rng.normal(size=shape)).astype(np.float32),
        "v": rng.normal(size=5).astype(np.float32),
    }


def singular_values(base, tau):
    return np.linalg.svd(base["m"].astype(np.float64) + np.asarray(tau["m"]), compute_uv=False)


@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 5, 6), (4, 4)])
@pytest.mark.parametrize("k", [2, 99])
def test_dense_changes_the_k_largest_singular_values_of_the_weights(shape, k):
    base, tau = model(0, 1.0, shape), model(1, 0.1, shape)
    mutate = singular_value_mutation(ROLES, 0.01, k, space="dense", base=base)
    child = apply(mutate, jax.random.key(0), tau, jnp.int32(0))
    weights = base["m"].astype(np.float64) + tau["m"]
    left, values, right = np.linalg.svd(weights, full_matrices=False)
    change = np.swapaxes(left, -1, -2) @ (np.asarray(child["m"], np.float64) - tau["m"])
    change = change @ np.swapaxes(right, -1, -2)
    noise = np.diagonal(change, axis1=-2, axis2=-1)
    off = change - np.eye(change.shape[-1]) * change
    assert np.abs(off).max() < 1e-5
    assert np.abs(noise[..., k:]).max(initial=0.0) < 1e-5
    assert (np.abs(noise[..., :k]) > 1e-5).all()
    assert np.unique(noise[..., :k]).size == noise[..., :k].size
    np.testing.assert_allclose(
        np.sort(singular_values(base, child)), np.sort(values + noise), atol=1e-5
    )


def test_dense_noise_has_the_asked_for_spread():
    base = {"m": np.tile(np.diag([30.0, 20.0, 10.0]).astype(np.float32), (1500, 1, 1))}
    tau = {"m": np.zeros_like(base["m"])}
    mutate = singular_value_mutation({"m": "matrix"}, 0.25, 2, space="dense", base=base)
    change = np.diagonal(mutate(jax.random.key(0), tau, 0)["m"], axis1=1, axis2=2)
    assert change[:, :2].std() == pytest.approx(0.25, rel=0.05)
    assert change[:, :2].mean() == pytest.approx(0.0, abs=0.02)
    assert np.abs(change[:, 2]).max() < 1e-5


def test_dense_singular_values_stop_at_zero():
    base, tau = model(0, 1e-3), model(1, 1e-3)
    mutate = singular_value_mutation(ROLES, 10.0, 5, space="dense", base=base)
    child = apply(mutate, jax.random.key(0), tau, jnp.int32(0))
    left, _, right = np.linalg.svd(base["m"].astype(np.float64) + tau["m"], full_matrices=False)
    weights = base["m"] + np.asarray(child["m"], np.float64)
    found = np.einsum("lmi,lmn,lin->li", left, weights, right)
    assert found.min() > -1e-4
    assert (np.abs(found) < 1e-4).any()
    assert (found > 1.0).any()


def test_spectral_noise_is_on_the_leading_gains_of_every_expert():
    child = singular_value_mutation(LAYOUT, 0.1, 2)(
        jax.random.key(0), LAYOUT.full(1.0), jnp.int32(0)
    )
    changed = np.asarray(child["m"]) != 1.0
    np.testing.assert_array_equal(changed, np.tile([1, 1, 0, 1, 1, 0, 0, 0], (2, 1)))
    noise = np.asarray(child["m"])[changed]
    assert np.unique(noise).size == noise.size
    np.testing.assert_array_equal(child["v"], [1.0, 1.0, 1.0])


def test_spectral_noise_has_the_asked_for_spread():
    wide = GainLayout(jax.tree.structure(0), (LeafLayout("matrix", (), (3000, 3000)),))
    mutate = singular_value_mutation(wide, 0.5, 2000)
    noise = np.asarray(mutate(jax.random.key(0), wide.zeros(), jnp.int32(0)))
    assert noise[:2000].std() == pytest.approx(0.5, rel=0.05)
    assert noise[3000:5000].std() == pytest.approx(0.5, rel=0.05)
    assert not noise[2000:3000].any()


class TestBadInput:
    def test_negative_noise(self):
        with pytest.raises(ValueError, match=r"sigma must not be negative, found -0\.1"):
            singular_value_mutation(LAYOUT, -0.1, 2)

    def test_no_singular_value(self):
        with pytest.raises(ValueError, match="at least 1 singular value to perturb, found k = 0"):
            singular_value_mutation(LAYOUT, 0.1, 0)

    def test_dense_without_a_base(self):
        with pytest.raises(ValueError, match="space 'dense' needs the base"):
            singular_value_mutation(ROLES, 0.1, 2, space="dense")

    def test_spectral_with_a_base(self):
        with pytest.raises(ValueError, match="no use for a base"):
            singular_value_mutation(LAYOUT, 0.1, 2, base=model(0, 1.0))

    def test_the_base_of_another_model(self):
        with pytest.raises(ValueError, match="leaf 'v' of the roles is missing in the base"):
            singular_value_mutation(ROLES, 0.1, 2, space="dense", base={"m": np.ones((2, 2))})
