import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.models.sampling import Sampling, choose, greedy, kept

VOCAB = 150
draw = jax.jit(choose)
keep = jax.jit(kept)


def logits(rows: int = 5, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (rows, vocab)).astype(np.float32)


def expected_kept(row: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Sorting, as the definition says."""
    order = np.argsort(-row)[: top_k or len(row)]
    weights = np.exp((row[order] - row[order[0]]).astype(np.float64))
    before = np.cumsum(weights / weights.sum()) - weights / weights.sum()
    return set(order[before < top_p].tolist())


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (7, 1.0), (0, 0.5), (0, 0.93), (20, 0.8), (999, 0.01)]
)
def test_kept_tokens_are_those_of_a_sorted_list(top_k: int, top_p: float) -> None:
    rows = logits()
    cuts = Sampling(1.0, top_k, top_p).cuts()
    assert cuts is not None
    mask = np.asarray(keep(rows, cuts.top_k, cuts.top_p))
    for row, found in zip(rows, mask, strict=True):
        assert set(np.flatnonzero(found).tolist()) == expected_kept(row, top_k, top_p)


def test_equally_likely_tokens_are_kept_together() -> None:
    row = jnp.array([[1.0, 2.0, 2.0, -jnp.inf]])
    assert keep(row, jnp.int32(1), jnp.float32(1.0)).tolist() == [[False, True, True, False]]
    assert keep(row, jnp.int32(9), jnp.float32(0.5)).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("vocab", [5, 64, 65, 200])
def test_greedy_takes_the_first_of_the_likeliest(vocab: int) -> None:
    rows = np.round(logits(20, vocab))
    np.testing.assert_array_equal(greedy(jnp.asarray(rows)), rows.argmax(axis=-1))


def test_drawn_tokens_follow_the_probabilities() -> None:
    count = 20_000
    row = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    cuts = Sampling(temperature=0.5, top_p=0.9).cuts()
    tokens = draw(jnp.tile(row, (count, 1)), cuts, jnp.arange(count), jnp.zeros(count, jnp.int32))
    found = np.bincount(np.asarray(tokens), minlength=4) / count
    # Squares of the probabilities; 16 + 9 of 30 parts are too few for 0.9, the fourth is cut.
    np.testing.assert_allclose(found, np.array([0, 4, 9, 16]) / 29, atol=0.015)


def test_noise_follows_from_seed_and_count() -> None:
    rows = jnp.zeros((4, VOCAB))
    cuts = Sampling(temperature=1.0).cuts()
    seeds, counts = jnp.array([3, 4, 3, 3]), jnp.array([0, 0, 1, 0])
    tokens = draw(rows, cuts, seeds, counts).tolist()
    assert tokens[0] == tokens[3]
    assert len(set(tokens)) == 3
    assert draw(rows, cuts, seeds[::-1], counts[::-1]).tolist() == tokens[::-1]


def test_the_coldest_draw_is_the_likeliest_token() -> None:
    rows = jax.random.normal(jax.random.key(0), (4, VOCAB)) * 1e4
    cuts = Sampling(temperature=1e-6, top_p=0.9).cuts()
    tokens = draw(rows, cuts, jnp.arange(4), jnp.zeros(4, jnp.int32))
    assert tokens.tolist() == rows.argmax(axis=1).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected at least 0, found -1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e-38}, "expected 0 or at least 1e-06, found 1e-38: use 0"),
        ({"top_k": -2}, "top_k: expected at least 0 .* found -2"),
        ({"top_p": 0.0}, r"top_p: expected a share in \(0, 1\], found 0"),
        ({"top_p": 1.5}, "found 1.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)  # type: ignore[arg-type]
