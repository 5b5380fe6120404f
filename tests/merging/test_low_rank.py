from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.low_rank import (
    LowRank,
    decompose_low_rank,
    factorise_low_rank,
    join_experts,
)
from cycleqd_jax.merging.spectral import decompose, expand, expert_gains

RNG = np.random.default_rng(0)
ROLES = {"a": "matrix", "b": "matrix", "n": "vector"}


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def update(rank: int = 3, layers: int = 2) -> dict[str, Any]:
    return {
        "a": LowRank(normal(layers, 9, rank), normal(layers, 7, rank)),
        "b": LowRank(normal(6, 1), normal(11, 1)),
        "n": np.zeros((layers, 5), np.float32),
    }


def dense(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, LowRank):
        return np.asarray(leaf)
    left, right = np.asarray(leaf.left, np.float64), np.asarray(leaf.right, np.float64)
    return left @ np.swapaxes(right, -1, -2)


def tree_dense(update: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: dense(leaf).astype(np.float32) for name, leaf in update.items()}


def assert_close(found: Any, wanted: Any) -> None:
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, atol=1e-6 * max(1, np.abs(leaf).max()))


def test_the_directions_are_singular_directions() -> None:
    leaf = update()["a"]
    u, v, error = factorise_low_rank(leaf, None)
    assert u.shape == (2, 9, 3)
    assert v.shape == (2, 7, 3)
    np.testing.assert_array_equal(error, 0)
    np.testing.assert_allclose(u @ np.swapaxes(v, -1, -2), dense(leaf), atol=2e-6)
    for layer in range(2):
        np.testing.assert_allclose(v[layer].T @ v[layer], np.eye(3), atol=1e-6)
        values = np.linalg.svd(dense(leaf)[layer])[1][:3]
        np.testing.assert_allclose(u[layer].T @ u[layer], np.diag(values**2), atol=1e-4)


def test_ill_conditioned_factors_are_rebuilt_to_rounding() -> None:
    scale = np.array([1, 1e-3, 1e-6, 1e-9], np.float32)
    leaf = LowRank(normal(40, 4) * scale, normal(30, 4))
    u, v, _ = factorise_low_rank(leaf, None)
    assert u.shape[-1] == 4
    np.testing.assert_allclose(u @ v.T, dense(leaf), rtol=1e-5, atol=1e-6 * np.abs(u @ v.T).max())
    values = np.linalg.norm(u, axis=0)
    np.testing.assert_allclose(values, np.linalg.svd(dense(leaf))[1][:4], rtol=1e-4)


@pytest.mark.parametrize("case", ["padding", "a zero factor", "no rank", "repeated"])
def test_directions_that_are_not_there_are_left_out(case: str) -> None:
    left, right = normal(2, 9, 4), normal(2, 7, 4)
    wanted = {"padding": 3, "a zero factor": 0, "no rank": 0, "repeated": 2}[case]
    if case == "padding":
        left[..., 3:] = right[..., 3:] = 0
        left[1, :, 2:] = 0
    elif case == "a zero factor":
        right[:] = 0
    elif case == "no rank":
        left, right = left[..., :0], right[..., :0]
    else:
        left[..., 2:] = left[..., :2]
    leaf = LowRank(left, right)
    u, v, error = factorise_low_rank(leaf, None)
    assert u.shape == (2, 9, wanted)
    np.testing.assert_array_equal(error, 0)
    np.testing.assert_allclose(u @ np.swapaxes(v, -1, -2), dense(leaf), atol=5e-6)


def test_more_factors_than_rows_are_reduced() -> None:
    leaf = LowRank(normal(4, 6), normal(5, 6))
    u, v, _ = factorise_low_rank(leaf, None)
    assert u.shape == (4, 4)
    np.testing.assert_allclose(u @ v.T, dense(leaf), atol=5e-6)


def test_a_limit_keeps_the_largest_and_reports_the_rest() -> None:
    leaf = update()["a"]
    u, v, error = factorise_low_rank(leaf, 2)
    rest = dense(leaf) - u @ np.swapaxes(v, -1, -2)
    norms = np.linalg.norm(rest, axis=(1, 2)) / np.linalg.norm(dense(leaf), axis=(1, 2))
    np.testing.assert_allclose(error, norms, rtol=1e-4)


def test_full_and_low_rank_experts_share_a_basis_in_any_order() -> None:
    lora, other = update(3), update(2)
    tau = {"a": normal(2, 9, 7), "b": normal(6, 11), "n": normal(2, 5)}
    parts = [decompose([tau], ROLES), decompose_low_rank(lora, ROLES)]
    parts.append(decompose_low_rank(other, ROLES))
    basis, report = join_experts(parts, [2, 0, 1])
    assert report.ranks == {"a": (2, 7, 3), "b": (1, 6, 1)}
    assert basis["a"].ranks == (2, 7, 3)
    assert report.error["a"].shape == (2, 3)
    for e, wanted in enumerate([tree_dense(other), tau, tree_dense(lora)]):
        assert_close(jax.jit(expand)(basis, expert_gains(basis, e)), wanted)


def test_a_low_rank_expert_is_what_decompose_finds_in_its_full_weights() -> None:
    lora = update(3)
    ours, _ = decompose_low_rank(lora, ROLES)
    theirs, _ = decompose([tree_dense(lora)], ROLES, rank=3)
    for name in ("a", "b"):
        sizes = [
            np.linalg.norm(basis[name].u, axis=-2) * np.linalg.norm(basis[name].v, axis=-2)
            for basis in (ours, theirs)
        ]
        np.testing.assert_allclose(sizes[0], sizes[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": jnp.ones((2, 9, 7))}, "leaf 'a': expected LowRank factors for a matrix"),
        ({"n": LowRank(normal(2, 1), normal(2, 1))}, "leaf 'n': expected an array for a vector"),
        ({"b": LowRank(np.full((6, 1), np.nan), normal(11, 1))}, "leaf 'b' .* not finite"),
        ({"c": normal(2)}, "leaf 'c' of the update is missing in the roles"),
    ],
)
def test_bad_updates_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decompose_low_rank({**update(), **change}, ROLES)


def test_bad_joins_are_refused() -> None:
    part = decompose_low_rank(update(), ROLES)
    with pytest.raises(ValueError, match="rank must be None"):
        decompose_low_rank(update(), ROLES, 0)
    with pytest.raises(ValueError, match=r"every expert of 0\.\.1 once, found \[0, 0\]"):
        join_experts([part, part], [0, 0])
    smaller = decompose_low_rank({"a": update()["a"]}, {"a": "matrix"})
    with pytest.raises(ValueError, match="bases of one model"):
        join_experts([part, smaller], [0, 1])
