import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.slerp import slerp_crossover
from cycleqd_jax.merging.spectral import decompose, expand, expert_gains, gain_layout
from cycleqd_jax.merging.task_vector import ROLES as KNOWN

ROLES = {"m": "matrix", "n": "matrix", "s": "vector", "v": "vector"}
SHAPES = {"m": (3, 6, 5), "n": (4, 7), "s": (3, 5), "v": (5,)}
apply = jax.jit(lambda operator, *args: operator(*args))


def parent(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def slerp_float64(t, a, b):
    """Shoemake's formula for one vector, as every library writes it, in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = (a * b).sum() / lengths if lengths else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    omega = np.arccos(cosine)
    return (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)


def reference(t, a, b):
    """One layer at a time: matrices over two axes, vectors over one."""
    out = {}
    for name, role in ROLES.items():
        layer_axes = 2 if role == "matrix" else 1
        x, y = a[name], b[name]
        stacked = x.shape[: x.ndim - layer_axes]
        out[name] = np.empty(x.shape)
        for layer in np.ndindex(*stacked):
            out[name][layer] = slerp_float64(t, x[layer], y[layer])
    return out


def check(child, expected, tolerance=1e-6):
    for name, value in expected.items():
        np.testing.assert_allclose(child[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("seed", range(4))
def test_dense_is_the_formula_layer_by_layer(seed):
    key, a, b = jax.random.key(seed), parent(seed), parent(10 + seed)
    t = -0.2 + 1.4 * float(jax.random.uniform(key, (), jnp.float32))
    child = apply(slerp_crossover(ROLES, -0.2, 1.2, space="dense"), key, a, b)
    check(child, reference(t, a, b))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_parallel_opposite_and_zero_parents_fall_back_to_the_chord(t):
    a, b = parent(0), parent(1)
    b["m"][0] = 2.5 * a["m"][0]
    b["m"][1] = -a["m"][1]
    b["m"][2] = 0.0
    a["n"] = np.zeros_like(a["n"])
    b["s"][1] = 1.01 * a["s"][1]
    a["v"] = np.zeros_like(a["v"])
    b["v"] = np.zeros_like(b["v"])
    child = apply(slerp_crossover(ROLES, t, t, space="dense"), jax.random.key(0), a, b)
    check(child, reference(t, a, b))


def test_the_ends_of_the_arc_are_the_parents():
    a, b = parent(2), parent(3)
    for t, expected in ((0.0, a), (1.0, b)):
        child = apply(slerp_crossover(ROLES, t, t, space="dense"), jax.random.key(0), a, b)
        check(child, expected)


def test_the_length_of_equally_long_parents_is_kept():
    a, b = parent(4), parent(5)
    for tree in (a, b):
        tree["n"] /= np.linalg.norm(tree["n"])
    child = apply(slerp_crossover(ROLES, space="dense"), jax.random.key(1), a, b)
    assert np.linalg.norm(child["n"]) == pytest.approx(1.0, rel=1e-6)


def orthogonal_experts():
    """Two experts that touch different rows, so that all their directions are orthogonal."""
    first, second = parent(6), parent(7)
    first["m"][:, :3], second["m"][:, 3:] = 0.0, 0.0
    first["n"][:2], second["n"][2:] = 0.0, 0.0
    first["s"][:, :2], second["s"][:, 2:] = 0.0, 0.0
    first["v"][:2], second["v"][2:] = 0.0, 0.0
    return [first, second]


def test_a_spectral_child_expands_to_the_dense_one_for_orthogonal_experts():
    basis, _ = decompose(orthogonal_experts(), ROLES)
    rng = np.random.default_rng(8)
    a, b = (
        gain_layout(basis).build(lambda _, leaf: rng.normal(size=leaf.shape).astype(np.float32))
        for _ in range(2)
    )
    key, dense = jax.random.key(9), jax.jit(expand)
    spectral = apply(slerp_crossover(basis), key, a, b)
    expected = apply(slerp_crossover(ROLES, space="dense"), key, dense(basis, a), dense(basis, b))
    check(dense(basis, spectral), expected, 1e-5)


def test_spectral_angles_weigh_directions_by_their_size():
    """Parents that differ only in a tiny direction are nearly parallel, so the chord is taken."""
    taus = [{"m": np.diag([1.0, 1e-4]).astype(np.float32)}]
    basis, _ = decompose(taus, {"m": "matrix"})
    a, b = {"m": jnp.asarray([1.0, 1.0])}, {"m": jnp.asarray([1.0, -1.0])}
    child = apply(slerp_crossover(basis, 0.25, 0.25), jax.random.key(0), a, b)
    np.testing.assert_allclose(child["m"], [1.0, 0.5], rtol=1e-6)


def test_two_experts_meet_on_the_arc():
    basis, _ = decompose(orthogonal_experts(), ROLES)
    a, b = expert_gains(basis, 0), expert_gains(basis, 1)
    child = apply(slerp_crossover(basis, 0.5, 0.5), jax.random.key(0), a, b)
    for gains in child.values():
        np.testing.assert_allclose(gains, np.sqrt(0.5), rtol=1e-6)


def test_one_place_on_the_arc_for_the_whole_model():
    a, b = parent(0), jax.tree.map(np.zeros_like, parent(0))
    child = apply(slerp_crossover(ROLES, space="dense"), jax.random.key(3), a, b)
    shares = np.concatenate([np.ravel(child[n] / a[n]) for n in ROLES])
    np.testing.assert_allclose(shares, shares[0], rtol=1e-5)
    assert 0 < shares[0] < 1


class TestBadInput:
    def test_ends_out_of_order(self):
        with pytest.raises(ValueError, match=r"expected low <= high.*found 0\.9 > 0\.1"):
            slerp_crossover(ROLES, 0.9, 0.1, space="dense")

    def test_spectral_needs_arrays(self):
        basis, _ = decompose([parent(0)], ROLES)
        with pytest.raises(ValueError, match="needs the basis with its arrays, found a GainLayout"):
            slerp_crossover(gain_layout(basis))
        with pytest.raises(ValueError, match="expected a tree of MatrixFactors"):
            slerp_crossover(ROLES)

    def test_unknown_role(self):
        with pytest.raises(ValueError, match=rf"leaf 'm': expected a role out of .*{KNOWN[0]}"):
            slerp_crossover({"m": "norm"}, space="dense")

    def test_unknown_space(self):
        # The annotation check of the test suite may catch it first; its error is no ValueError.
        with pytest.raises((ValueError, TypeError), match="latent"):
            slerp_crossover(ROLES, space="latent")  # type: ignore[arg-type]
