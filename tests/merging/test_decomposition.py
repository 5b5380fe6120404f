import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.decomposition import (
    METHODS,
    DecompositionReport,
    check_method,
    factorise,
    noise_floor,
)
from cycleqd_jax.merging.spectral import FLOAT32_EPS, decompose, expand, expert_gains

RNG = np.random.default_rng(7)


def lora_family(shape, rank, size, decay=1.0, dtype=np.float32):
    """A base of unit entries and an expert that adds a rank-r matrix of relative size ``size``."""
    m, n = shape
    base = RNG.normal(size=(2, m, n))
    spread = np.geomspace(1.0, decay, rank)
    update = (RNG.normal(size=(2, m, rank)) * spread) @ RNG.normal(size=(2, rank, n))
    update *= size * np.linalg.norm(base) / np.linalg.norm(update)
    base = base.astype(dtype)
    return base, (base.astype(np.float64) + update).astype(dtype)


@pytest.mark.parametrize("shape", [(24, 48), (48, 24)])
@pytest.mark.parametrize("size", [0.5, 0.003])
@pytest.mark.parametrize("decay", [1.0, 1e-2])
def test_a_lora_expert_comes_out_at_its_own_rank(shape, size, decay):
    base, expert = lora_family(shape, rank=4, size=size, decay=decay)
    tau = {"w": expert - base}
    basis, report = decompose([tau, tau], {"w": "matrix"}, base={"w": base})
    assert report.ranks["w"] == (4, 4)
    rebuilt = base + np.asarray(expand(basis, expert_gains(basis, 1))["w"])
    error = np.linalg.norm(rebuilt - expert) / np.linalg.norm(expert)
    assert error < 2 * FLOAT32_EPS


def test_without_the_base_nothing_but_the_own_rounding_is_dropped():
    base, expert = lora_family((32, 32), rank=4, size=0.003)
    _, report = decompose([{"w": expert - base}], {"w": "matrix"})
    assert report.ranks["w"][0] > 24
    assert report.error["w"].max() < 2e-6


def test_bfloat16_noise_is_kept_unless_asked_for():
    base, expert = lora_family((32, 32), rank=2, size=0.2, dtype=jnp.bfloat16)
    tau = {"w": expert.astype(np.float32) - base.astype(np.float32)}
    _, exact = decompose([tau], {"w": "matrix"}, base={"w": base})
    assert exact.ranks["w"] == (32,)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    _, denoised = decompose([tau], {"w": "matrix"}, base={"w": base}, noise=eps)
    assert denoised.ranks["w"] == (2,)
    assert 0.99 < denoised.minimum() < 1.0 - 1e-6


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_directions_are_singular_directions_over_six_decades(shape):
    """Each direction, not only the sum, agrees with float64 SVD: mutation scales them apart."""
    left, _, right = np.linalg.svd(RNG.normal(size=shape), full_matrices=False)
    values = np.geomspace(1.0, 1e-5, 20)
    tau = ((left * values) @ right).astype(np.float32)
    exact_left, exact_values, exact_right = np.linalg.svd(tau.astype(np.float64), False)
    u, v, error = factorise(tau, np.zeros(()), None)
    assert error < 1e-6
    for i in range(20):
        term = np.outer(u[:, i], v[:, i])
        exact = exact_values[i] * np.outer(exact_left[:, i], exact_right[i])
        assert np.linalg.norm(term - exact) < 1e-6, i


def test_truncation_keeps_the_largest_directions_and_reports_the_energy():
    left, _, right = np.linalg.svd(RNG.normal(size=(16, 12)), full_matrices=False)
    values = np.asarray([4.0, 3.0, 2.0, 1.0] + [0.0] * 8)
    tau = ((left * values) @ right).astype(np.float32)
    basis, report = decompose([{"w": tau}], {"w": "matrix"}, rank=2)
    assert report.ranks["w"] == (2,)
    np.testing.assert_allclose(report.energy["w"], [25 / 30], rtol=1e-5)
    assert report.minimum() == pytest.approx(25 / 30, rel=1e-5)
    kept = np.asarray(expand(basis, expert_gains(basis, 0))["w"])
    np.testing.assert_allclose(kept, (left[:, :2] * values[:2]) @ right[:2], atol=2e-6)


def test_layers_of_different_rank_share_the_largest():
    tau = np.zeros((3, 10, 8), np.float32)
    tau[1] = np.outer(RNG.normal(size=10), RNG.normal(size=8))
    tau[2] = RNG.normal(size=(10, 3)) @ RNG.normal(size=(3, 8))
    u, v, error = factorise(tau, np.full(3, 1e-5), None)
    assert u.shape == (3, 10, 3)
    assert v.shape == (3, 8, 3)
    assert error.shape == (3,)
    assert error.max() < 1e-6
    assert not np.asarray(u[0] @ v[0].T).any()


def test_tiny_and_huge_task_vectors_do_not_lose_precision():
    tau = RNG.normal(size=(12, 9)).astype(np.float32)
    for scale in (1e-18, 1e12):
        u, v, error = factorise(tau * np.float32(scale), np.zeros(()), None)
        assert u.shape[-1] == 9
        assert np.isfinite(v).all()
        assert error < 2e-6


def test_noise_floor_exceeds_the_rounding_it_stands_for():
    weights = RNG.normal(size=(4, 60, 80)) * np.geomspace(1, 50, 80)
    rounding = weights.astype(np.float32) - weights
    largest = np.linalg.norm(rounding, ord=2, axis=(1, 2))
    floor = noise_floor(weights.astype(np.float32), FLOAT32_EPS)
    assert floor.shape == (4,)
    assert (floor > 1.5 * largest).all()
    assert (floor < 10 * largest).all()


def test_report_of_a_model_without_matrices():
    report = DecompositionReport(ranks={}, error={})
    assert report.minimum() == 1.0
    assert report.mean() == 1.0


def test_report_averages_over_matrices_and_experts():
    report = DecompositionReport(ranks={"w": (1, 1)}, error={"w": np.asarray([0.0, 0.1])})
    assert report.mean() == pytest.approx(0.995)
    assert report.minimum() == pytest.approx(0.99)


def spectrum_family(decades=5.0, size=20):
    left, _, right = np.linalg.svd(RNG.normal(size=(3, size, size + 10)), full_matrices=False)
    values = np.geomspace(1.0, 10.0**-decades, size)
    return ((left * values) @ right).astype(np.float32), values


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("transpose", [False, True])
def test_every_method_finds_the_leading_singular_directions(method, transpose):
    tau, values = spectrum_family()
    tau = np.swapaxes(tau, -1, -2) if transpose else tau
    u, v, error = factorise(tau, np.zeros(3), 6, method=method)
    left, _, right = np.linalg.svd(tau.astype(np.float64), full_matrices=False)
    assert u.shape == (*tau.shape[:-1], 6)
    for layer in range(3):
        for i in range(6):
            term = np.outer(u[layer, :, i], v[layer, :, i])
            exact = values[i] * np.outer(left[layer, :, i], right[layer, i])
            assert np.linalg.norm(term - exact) < 5e-6, (layer, i)
    tail = np.sqrt(np.sum(values[6:] ** 2) / np.sum(values**2))
    np.testing.assert_allclose(error, tail, rtol=1e-4)


@pytest.mark.parametrize(("method", "atol"), [("gram", 1e-7), ("svd", 1e-5)])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (40, 40)])
def test_the_shorter_side_is_orthonormal(method, atol, shape):
    tau = RNG.normal(size=shape).astype(np.float32)
    tau[:, 0] *= 1e3
    u, v, error = factorise(tau, np.zeros(()), None, method=method)
    short = np.asarray(v if shape[0] > shape[1] else u, np.float64)
    np.testing.assert_allclose(short.T @ short, np.eye(40), atol=atol)
    assert error < 1e-5


def test_a_sketch_finds_the_rank_of_a_lora_expert():
    base, expert = lora_family((48, 96), rank=4, size=0.5)
    basis, report = decompose(
        [{"w": expert - base}], {"w": "matrix"}, 16, base={"w": base}, method="randomized"
    )
    assert report.ranks["w"] == (4,)
    assert report.error["w"].max() < 1e-5
    assert basis["w"].u.shape == (2, 48, 4)


def test_the_same_matrix_gives_the_same_sketch():
    tau = RNG.normal(size=(2, 30, 20)).astype(np.float32)
    first = factorise(tau, np.zeros(2), 4, method="randomized")
    second = factorise(tau, np.zeros(2), 4, method="randomized")
    np.testing.assert_array_equal(first[0], second[0])


def test_methods_that_cannot_serve_are_refused(monkeypatch):
    tau = np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match=r"expected a method out of.*found 'qr'"):
        check_method("qr", None, None)
    with pytest.raises(ValueError, match="'randomized' needs a rank"):
        decompose([{"w": tau}], {"w": "matrix"}, method="randomized")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ValueError, match=r"needs float64, which a TPU does not have.*'svd'"):
        factorise(tau, np.zeros(()), None)


ON_EIGHT_DEVICES = """
import jax, numpy as np
from cycleqd_jax.merging.decomposition import METHODS, factorise

assert jax.device_count() == 8
mesh = jax.make_mesh((4, 2), ("population", "model"))
rng = np.random.default_rng(3)
for method in METHODS:
    for shape in [(5, 12, 20), (20, 12)]:
        tau = rng.normal(size=shape).astype(np.float32)
        floor = np.full(shape[:-2], 1e-6, np.float32)
        alone = factorise(tau, floor, 6, method=method)
        split = factorise(tau, floor, 6, method=method, mesh=mesh)
        for a, b in zip(alone, split):
            assert a.shape == b.shape
        product = [np.asarray(u) @ np.swapaxes(np.asarray(v), -1, -2) for u, v, _ in (alone, split)]
        np.testing.assert_allclose(product[1], product[0], atol=2e-5)
        np.testing.assert_allclose(split[2], alone[2], rtol=1e-5)
print("equal")
"""


@pytest.mark.slow
def test_layers_split_over_eight_devices_give_the_same(on_eight_devices):
    assert on_eight_devices(ON_EIGHT_DEVICES) == "equal"
