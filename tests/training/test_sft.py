"""Training against a slow transcription, and what a run promises."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cycleqd_jax.models.llama import forward, init_params
from cycleqd_jax.models.specs import LlamaConfig
from cycleqd_jax.training import sft
from cycleqd_jax.training.corpus import Corpus, bucket_rows
from cycleqd_jax.training.sft import TrainConfig, rows_per_update, summed_loss, train

CONFIG = LlamaConfig(
    vocab_size=12,
    hidden_size=8,
    intermediate_size=12,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    tie_embeddings=True,
)
Row = tuple[list[int], list[int]]
WIDE = 12
EMPTY: Row = ([], [])
SHORT = ([1, 2, 3, 4, 5], [0, 0, 1, 1, 1])
LONG = ([7, 6, 5, 7, 6, 5, 7, 6, 5], [1] * 9)
# Tests share settings and shapes where they can: most of their time is compilation.
RUN = TrainConfig(steps=8, batch_size=2, learning_rate=0.01, warmup=0.25, clip=0.5)

jitted_forward = jax.jit(forward, static_argnums=1)
jitted_loss = jax.jit(summed_loss, static_argnums=1)


def fresh(scale: float = 1.0, config: LlamaConfig = CONFIG) -> Any:
    """With a larger scale the losses are far from those of a uniform guess."""
    return jax.tree.map(lambda leaf: scale * leaf, init_params(jax.random.key(0), config))


def corpus_of(*rows: Any, unit: int = 1) -> Corpus:
    (corpus,) = bucket_rows(rows, 0, unit=unit)
    return corpus


# What follows a number is another one.
FACT_ROWS = [([0, first, (5 * first) % 11], [0, 0, 1]) for first in range(1, 11)]
FACTS = corpus_of(*FACT_ROWS)


def slow_loss(params: Any, tokens: Sequence[int], mask: Sequence[int]) -> float:
    """Minus the log-probability of the marked tokens of one text, a token at a time."""
    total = 0.0
    for at in range(1, len(tokens)):
        if mask[at]:
            seen = [*tokens[:at], *[11] * (WIDE - at)]  # what comes later cannot matter
            logits = np.asarray(jitted_forward(params, CONFIG, jnp.asarray([seen])))[0, at - 1]
            scores = [math.exp(float(value)) for value in logits]
            total -= math.log(scores[tokens[at]] / sum(scores))
    return total


def slow_train(params: Any, rows: Sequence[Any], run: TrainConfig) -> tuple[Any, list[float]]:
    """AdamW with warm-up, cosine decay and clipping, written from the papers; all rows a step."""
    leaves, tree = jax.tree.flatten(params)
    p = [np.asarray(leaf, np.float64) for leaf in leaves]
    m, v = [0 * x for x in p], [0 * x for x in p]
    targets = sum(sum(mask[1:]) for _, mask in rows)
    warm = max(1, round(run.warmup * run.steps))
    losses = []

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params: Any) -> Any:
        total = jnp.zeros(())
        for tokens, mask in rows:
            logits = forward(params, CONFIG, jnp.asarray([tokens]))[0, :-1]
            likely = jax.nn.log_softmax(logits)[
                jnp.arange(len(tokens) - 1), jnp.asarray(tokens[1:])
            ]
            total -= jnp.sum(likely * jnp.asarray(mask[1:]))
        return total / targets

    for t in range(run.steps):
        loss, gradient = mean_loss(jax.tree.unflatten(tree, [jnp.float32(x) for x in p]))
        losses.append(float(loss))
        g = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradient)]
        norm = math.sqrt(sum(float((x * x).sum()) for x in g))
        g = [x * min(1.0, run.clip / norm) for x in g]
        progress = (t - warm) / (run.steps - warm)
        low = 0.1 * run.learning_rate
        cosine = low + (run.learning_rate - low) * (1 + math.cos(math.pi * progress)) / 2
        first = run.learning_rate / warm
        rate = first + (run.learning_rate - first) * t / warm if t < warm else cosine
        m = [0.9 * a + 0.1 * x for a, x in zip(m, g, strict=True)]
        v = [0.98 * a + 0.02 * x * x for a, x in zip(v, g, strict=True)]
        for i, x in enumerate(p):
            step = (m[i] / (1 - 0.9 ** (t + 1))) / (np.sqrt(v[i] / (1 - 0.98 ** (t + 1))) + 1e-8)
            p[i] = x - rate * (step + run.weight_decay * x)
    return jax.tree.unflatten(tree, p), losses


def assert_close(ours: Any, reference: Any, atol: float = 1e-6) -> None:
    pairs = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(reference), strict=True)
    for (path, a), b in pairs:
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def largest_change(a: Any, b: Any) -> float:
    return max(
        float(jnp.abs(x - y).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def loss_of(params: Any, rows: Sequence[Any], pad: int = 0) -> float:
    """The loss of at most three texts, in a batch of always the same shape."""
    tokens, counts = np.full((3, WIDE), pad), np.zeros((3, WIDE), bool)
    for row, (ids, mask) in enumerate(rows):
        tokens[row, : len(ids)], counts[row, : len(ids)] = ids, mask
    return float(jitted_loss(params, CONFIG, jnp.asarray(tokens), jnp.asarray(counts)))


def test_the_loss_is_the_one_of_the_slow_transcription() -> None:
    params = fresh(scale=3)
    slow = [slow_loss(params, *row) for row in (SHORT, LONG)]
    assert loss_of(params, [SHORT]) == pytest.approx(slow[0], rel=1e-5)
    assert loss_of(params, [LONG]) == pytest.approx(slow[1], rel=1e-5)
    assert loss_of(params, [SHORT, LONG, SHORT]) == pytest.approx(2 * slow[0] + slow[1], rel=1e-5)


def test_padding_and_rows_of_padding_do_not_change_the_loss() -> None:
    params, blank = fresh(scale=3), EMPTY
    alone = loss_of(params, [SHORT])
    for pad in (0, 9):
        assert loss_of(params, [blank, SHORT, blank], pad) == pytest.approx(alone, rel=1e-6)
    assert loss_of(params, [([*SHORT[0], 8, 8], [*SHORT[1], 0, 1])]) > alone + 0.1
    assert loss_of(params, [blank]) == 0


def test_the_first_token_is_never_predicted() -> None:
    params, (tokens, mask) = fresh(scale=3), SHORT
    assert loss_of(params, [(tokens, [1, *mask[1:]])]) == loss_of(params, [(tokens, mask)]) > 0


def test_training_is_adamw_on_the_mean_over_all_targets_of_all_buckets() -> None:
    start, losses = fresh(), []
    # Buckets of one row: every update holds both rows.
    corpora = [corpus_of(SHORT), corpus_of(LONG)]
    trained = train(start, CONFIG, corpora, RUN, lambda step, loss: losses.append((step, loss)))
    reference, slow_losses = slow_train(start, [SHORT, LONG], RUN)
    assert largest_change(start, reference) > 0.02
    assert_close(trained, reference, atol=1e-5)
    assert losses == [(8, pytest.approx(slow_losses[-1], rel=1e-4))]
    assert slow_losses[-1] < slow_losses[0]


def test_rows_without_targets_are_as_none() -> None:
    blank: Row = ([3] * 9, [0] * 9)
    alone = train(fresh(), CONFIG, [corpus_of(SHORT)], RUN)
    assert largest_change(alone, fresh()) > 0.02
    with_blank = train(fresh(), CONFIG, [corpus_of(SHORT), corpus_of(blank)], RUN)
    assert_close(with_blank, alone, atol=1e-5)


@pytest.mark.parametrize("settings", [RUN, TrainConfig(steps=0)], ids=["steps", "no steps"])
def test_the_parameters_that_came_in_are_not_modified(settings: TrainConfig) -> None:
    params = fresh()
    before = jax.tree.map(np.array, params)
    train(params, CONFIG, [corpus_of(SHORT)], settings)
    for kept, leaf in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), kept)


@pytest.mark.slow
def test_a_seed_decides_the_run() -> None:
    one = train(fresh(), CONFIG, [FACTS], RUN)
    assert largest_change(one, train(fresh(), CONFIG, [FACTS], RUN)) == 0
    other = train(fresh(), CONFIG, [FACTS], dataclasses.replace(RUN, seed=1))
    assert largest_change(one, other) > 1e-3


@pytest.mark.slow
def test_the_run_does_not_depend_on_how_often_it_reports(monkeypatch: Any) -> None:
    steps: list[int] = []
    whole = train(fresh(), CONFIG, [FACTS], RUN)
    monkeypatch.setattr(sft, "_CHUNK", 4)
    pieces = train(fresh(), CONFIG, [FACTS], RUN, lambda step, loss: steps.append(step))
    assert steps == [4, 8]
    assert_close(whole, pieces, atol=1e-5)


def test_a_tiny_corpus_is_learned_by_one_compiled_chunk(monkeypatch: Any) -> None:
    traces = []

    def counting(*args: Any) -> Any:
        traces.append(args[2].shape)
        return forward(*args)

    monkeypatch.setattr(sft, "forward", counting)
    reports: list[tuple[int, float]] = []
    run = TrainConfig(steps=300, batch_size=16, learning_rate=0.03, weight_decay=0.0)
    trained = train(fresh(), CONFIG, [FACTS], run, lambda *report: reports.append(report))
    # Every row was drawn, or its fact could not be known.
    assert min(slow_loss(fresh(), *row) for row in FACT_ROWS) > 2
    assert max(slow_loss(trained, *row) for row in FACT_ROWS) < 0.5
    assert [step for step, _ in reports] == list(range(10, 301, 10))
    assert reports[-1][1] < 0.2 < reports[0][1]
    assert traces == [(16, 2)]


@pytest.mark.slow
def test_tree_and_dtypes_are_kept_in_bfloat16() -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    params = fresh(config=config)
    trained = train(params, config, [corpus_of(LONG)], RUN)
    jax.tree.map(lambda new, old: None, trained, params)  # fails for another structure
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("bfloat16")}
    assert largest_change(trained, params) > 0


def test_a_loss_that_is_not_a_number_is_an_error() -> None:
    params = fresh()
    params = params.replace(final_norm=params.final_norm.at[0].set(jnp.nan))
    message = r"the loss is nan after step 8 of 8: lower learning_rate \(now 0.01\) or check"
    with pytest.raises(ValueError, match=message):
        train(params, CONFIG, [corpus_of(SHORT)], RUN)


def test_an_empty_corpus_is_an_error() -> None:
    empty = jax.tree.map(lambda leaf: leaf[:0], corpus_of(LONG))
    with pytest.raises(ValueError, match=r"at least one row each, found sizes \[\]"):
        train(fresh(), CONFIG, [], RUN)
    with pytest.raises(ValueError, match=r"at least one row each, found sizes \[1, 0\]"):
        train(fresh(), CONFIG, [corpus_of(LONG), empty], RUN)


SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=8)


@hypothesis_settings(deadline=None, max_examples=200)
@given(sizes=SIZES, batch=st.integers(1, 128))
def test_the_rows_of_an_update_are_shared_out_fairly(sizes: list[int], batch: int) -> None:
    if len(sizes) > batch:
        message = f"expected a batch of at least {len(sizes)} rows, one a bucket, found {batch}"
        with pytest.raises(ValueError, match=message):
            rows_per_update(sizes, batch)
        return
    shares = rows_per_update(sizes, batch)
    exact = [batch * size / sum(sizes) for size in sizes]
    assert sum(shares) == batch
    assert min(shares) >= 1
    # Nobody has a row too many but those that have only one.
    assert all(share == 1 or share < e + 1 for share, e in zip(shares, exact, strict=True))
    if min(exact) >= 1:
        assert all(abs(share - e) < 1 for share, e in zip(shares, exact, strict=True))


@pytest.mark.parametrize(
    ("sizes", "batch", "shares"),
    [([5], 8, (8,)), ([1, 1], 4, (2, 2)), ([1, 99], 4, (1, 3)), ([30, 10], 8, (6, 2))],
)
def test_known_shares(sizes: list[int], batch: int, shares: tuple[int, ...]) -> None:
    assert rows_per_update(sizes, batch) == shares
