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
    pairs += [(pairs[i // 40][0], [i % 40]) for i in np.flatnonzero(likely)]
    found = Scorer(CONFIG, max_tokens=512).score(pairs, params)
    assert found.log_probability.shape == (1, len(pairs))
    assert found.greedy.sum() >= 4
    assert_same(found, pairs, [params])
