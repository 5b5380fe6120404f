import numpy as np
import pytest

from cycleqd_jax.merging import comparison
from cycleqd_jax.merging.comparison import compare_task_vectors, spectral_similarity, total
from cycleqd_jax.merging.low_rank import LowRank
from cycleqd_jax.merging.spectral import decompose

RNG = np.random.default_rng(0)
ROLES = {"m": "matrix", "n": "vector"}


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


BASE = {"m": normal(2, 6, 5), "n": normal(2, 4)}
FULL = {"m": BASE["m"] + normal(2, 6, 5), "n": BASE["n"] + normal(2, 4)}
LEFT, RIGHT = normal(2, 6, 2), normal(2, 5, 2)
LORA = {"m": LowRank(LEFT, RIGHT), "n": np.zeros((2, 4), np.float32)}
STILL = {"m": BASE["m"], "n": BASE["n"]}


def test_figures_are_those_of_the_full_task_vectors() -> None:
    found = compare_task_vectors(BASE, [FULL, LORA, STILL], ROLES)
    taus = np.stack([FULL["m"] - BASE["m"], LEFT @ np.swapaxes(RIGHT, 1, 2), 0 * BASE["m"]])
    leaf = found["m"]
    np.testing.assert_allclose(leaf.norm, np.linalg.norm(taus, axis=(2, 3)).T, rtol=1e-5)
    np.testing.assert_allclose(leaf.base_square, (BASE["m"] ** 2).sum(axis=(1, 2)), rtol=1e-5)
    for layer in range(2):
        x, y = taus[0, layer].ravel(), taus[1, layer].ravel()
        cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        assert leaf.cosine[layer, 0, 1] == pytest.approx(cosine, abs=1e-5)
        assert leaf.sign_agreement[layer, 1, 0] == pytest.approx(np.mean(x * y > 0))
        assert leaf.cosine[layer, 0, 0] == pytest.approx(1)
    assert np.isnan(leaf.cosine[:, 0, 2]).all()
    assert np.isnan(leaf.sign_agreement[:, 2, 2]).all()


def test_vectors_of_an_expert_given_by_updates_are_updates() -> None:
    lora = {**LORA, "n": np.ones((2, 4), np.float32)}
    found = compare_task_vectors(BASE, [FULL, lora], ROLES)["n"]
    np.testing.assert_allclose(found.norm[:, 1], 2, rtol=1e-6)
    np.testing.assert_allclose(
        found.norm[:, 0], np.linalg.norm(FULL["n"] - BASE["n"], axis=1), rtol=1e-5
    )


def test_the_total_is_that_of_one_long_vector() -> None:
    found = total(compare_task_vectors(BASE, [FULL, FULL, STILL], ROLES))
    flat = np.concatenate([(FULL[k] - BASE[k]).ravel() for k in ROLES])
    assert found.norm[0] == pytest.approx(np.linalg.norm(flat), rel=1e-5)
    assert found.cosine[0, 1] == pytest.approx(1)
    assert found.sign_agreement[0, 1] == pytest.approx(1)
    assert found.both[0, 1] == flat.size


def test_spectra_are_compared_by_shape_alone() -> None:
    q1, q2, q3, q4 = (np.linalg.qr(normal(5, 5))[0] for _ in range(4))
    values = np.array([8, 4, 2, 1, 0.5], np.float32)
    flat = np.ones(5, np.float32)
    taus = [
        {"m": (q1 * values) @ q2},
        {"m": 3 * (q3 * values) @ q4},
        {"m": (q1 * flat) @ q2},
        {"m": 0 * q1},
    ]
    basis, _ = decompose(taus, {"m": "matrix"})
    found = spectral_similarity(basis)["m"]
    assert found[0, 1] == pytest.approx(1, abs=1e-5)
    wanted = values.sum() / np.linalg.norm(values) / np.sqrt(5)
    assert found[0, 2] == pytest.approx(wanted, abs=1e-5)
    assert np.isnan(found[0, 3])


def test_another_tree_is_refused() -> None:
    with pytest.raises(ValueError, match="leaf 'n' of roles is missing in expert 1"):
        compare_task_vectors(BASE, [FULL, {"m": BASE["m"]}], ROLES)


def test_blocks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare_task_vectors(BASE, [FULL, LORA], ROLES)
    monkeypatch.setattr(comparison, "_BLOCK", 10)  # two rows of the matrix
    cut = compare_task_vectors(BASE, [FULL, LORA], ROLES)
    for path, leaf in whole.items():
        for name in ("dot", "both", "agree", "base_square"):
            np.testing.assert_allclose(getattr(cut[path], name), getattr(leaf, name), rtol=1e-5)
