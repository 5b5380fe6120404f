from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.models import kernels, likelihood, llama
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.likelihood import Likelihoods, Scorer
from cycleqd_jax.models.specs import roles

Make = Callable[..., Any]
Pair = tuple[list[int], list[int]]
CONFIG = LlamaConfig(40, 16, 24, 2, 4, 2, 4, max_positions=96, tie_embeddings=True)


def draw_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Questions with choices, texts of one token each, texts that begin another, full windows."""
    rng = np.random.default_rng(seed)

    def tokens(length: int) -> list[int]:
        return rng.integers(0, CONFIG.vocab_size, length).tolist()

    pairs = []
    for _ in range(count):
        question = tokens(int(rng.integers(1, 30)))
        pairs += [(question, tokens(int(n))) for n in rng.integers(1, 6, 4)]
        pairs += [(question, [token]) for token in tokens(3)]
        pairs.append((question[:1], question[1:] + tokens(1)))
    return [*pairs, (tokens(1), tokens(96)), (tokens(40), tokens(57)), (tokens(1), tokens(1))]


def one_by_one(
    pairs: Sequence[Pair], params: Any, config: LlamaConfig = CONFIG
) -> tuple[np.ndarray, np.ndarray]:
    """The definition: a softmax after every token of every text, each text in a row of its own."""
    width = config.max_positions
    texts = np.zeros((len(pairs), width), int)
    for i, (context, continuation) in enumerate(pairs):
        text = [*context, *continuation[:-1]]
        texts[i, : len(text)] = text
    logits = np.asarray(
        jax.jit(llama.forward, static_argnums=1)(params, config, jnp.asarray(texts)), np.float64
    )
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    values, greedy = [], []
    for i, (context, continuation) in enumerate(pairs):
        at = np.arange(len(continuation)) + len(context) - 1
        values.append(logs[i, at, continuation].sum())
        greedy.append(bool((logits[i, at].argmax(axis=-1) == continuation).all()))
    return np.array(values), np.array(greedy)


def assert_same(found: Likelihoods, pairs: Sequence[Pair], models: Sequence[Any]) -> None:
    for candidate, model in enumerate(models):
        values, greedy = one_by_one(pairs, model)
        np.testing.assert_allclose(found.log_probability[candidate], values, atol=3e-5)
        assert found.greedy[candidate].tolist() == greedy.tolist()


def test_packed_texts_are_as_likely_as_texts_alone(make_params: Make) -> None:
    params = make_params(CONFIG)
    pairs = draw_pairs(12)
    # What decoding would give, so that some continuations are the greedy ones.
    likely = one_by_one([(c, [t]) for c, _ in pairs[:4] for t in range(40)], params)[1]
    pairs += [(pairs[i // 40][0], [i % 40]) for i in np.flatnonzero(likely).tolist()]
    found = Scorer(CONFIG, max_tokens=512).score(pairs, params)
    assert found.log_probability.shape == (1, len(pairs))
    assert found.greedy.sum() >= 4
    assert_same(found, pairs, [params])


@pytest.mark.slow
def test_every_kind_of_population_is_scored_as_its_candidates_alone(
    make_params: Make, make_population: Make
) -> None:
    base = make_params(CONFIG)
    basis, gains = make_population(CONFIG, candidates=3)
    attached = kernels.attach(base, basis, gains)
    models = [jax.jit(kernels.materialise_candidate)(attached, c) for c in range(3)]
    pairs = draw_pairs(3, seed=1)
    rows = Scorer(CONFIG, mode="rows")
    assert_same(rows.score(pairs, attached), pairs, models)
    apart = Scorer(CONFIG, mode="candidates")
    assert_same(apart.score(pairs, attached), pairs, models)
    stacked = kernels.stack(models, roles(CONFIG))
    assert_same(rows.score(pairs, stacked), pairs, models)
    # Once per kind of weights; other gains compile nothing.
    assert (rows.traces, apart.traces) == (2, 1)
    rows.score(pairs, kernels.attach(base, basis, jax.tree.map(lambda g: 1.5 * g, gains)))
    assert rows.traces == 2


def test_a_window_counts_places_in_the_text_not_in_the_row(make_params: Make) -> None:
    config = replace(CONFIG, architecture="mistral", sliding_window=4)
    params, pairs = make_params(config), draw_pairs(4, seed=2)
    found = Scorer(config).score(pairs, params)
    np.testing.assert_allclose(
        found.log_probability[0], one_by_one(pairs, params, config)[0], atol=3e-5
    )
    free = Scorer(CONFIG).score(pairs, params)
    assert np.abs(free.log_probability - found.log_probability).max() > 1e-2


def test_slices_of_queries_and_logits_change_nothing(
    make_params: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, pairs = make_params(CONFIG), draw_pairs(2, seed=3)
    whole = Scorer(CONFIG).score(pairs, params)
    monkeypatch.setattr(likelihood, "_QUERIES", 64)
    monkeypatch.setattr(likelihood, "_LOGITS", 8 * CONFIG.vocab_size)
    shares: list[float] = []
    sliced = Scorer(CONFIG, max_tokens=256).score(pairs, params, shares.append)
    np.testing.assert_allclose(sliced.log_probability, whole.log_probability, atol=1e-5)
    assert sliced.greedy.tolist() == whole.greedy.tolist()
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_the_softmax_is_taken_in_float32_for_bfloat16_weights(make_params: Make) -> None:
    config = replace(CONFIG, dtype="bfloat16")
    found = Scorer(config).score([([1], [t]) for t in range(40)], make_params(config))
    # Probabilities of the whole vocabulary add up, to float32's accuracy.
    assert np.exp(found.log_probability).sum() == pytest.approx(1, abs=1e-5)
    assert found.greedy.sum() == 1


def test_no_texts_and_texts_that_cannot_be_scored(make_params: Make) -> None:
    scorer, params = Scorer(CONFIG), make_params(CONFIG)
    assert scorer.score([], params).log_probability.shape == (1, 0)
    for pair, message in (
        (([], [1]), "text 0: expected at least one token of context"),
        (([1], []), "one of continuation, found 1 and 0"),
        (([1] * 90, [1] * 8), "at most 96 tokens to read"),
        (([1], [40]), r"token ids in \[0, 40\)"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer.score([pair], params)
    with pytest.raises(ValueError, match="expected a mode of"):
        Scorer(CONFIG, mode="fast")
    for name in ("max_tokens", "workers"):
        with pytest.raises(ValueError, match=f"expected {name} of at least 1, found 0"):
            Scorer(CONFIG, **{name: 0})  # type: ignore[arg-type]


def test_weights_of_another_dtype_are_compiled_by_one_thread(make_params: Make) -> None:
    params, pairs = make_params(CONFIG), draw_pairs(12)
    scorer = Scorer(CONFIG, max_tokens=256, workers=4)
    scorer.score(pairs, params)
    once = scorer.traces
    scorer.score(pairs, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    assert scorer.traces == 2 * once
    assert len(scorer._compiled) == 2 * once
