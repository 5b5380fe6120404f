"""Training against a slow transcription, and what a run promises."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
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
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    tie_embeddings=True,
)
WIDE = 12
jitted_forward = jax.jit(forward, static_argnums=1)
SHORT = ([1, 2, 3, 4, 5], [0, 0, 1, 1, 1])
LONG = ([7, 6, 5, 7, 6, 5, 7, 6, 5], [1] * 9)


def fresh(seed: int = 0, config: LlamaConfig = CONFIG) -> Any:
    # Larger than usual, so that losses differ clearly from those of a uniform guess.
    return jax.tree.map(lambda leaf: 4 * leaf, init_params(jax.random.key(seed), config))


def corpus_of(*rows: Any, unit: int = 1) -> Corpus:
    (corpus,) = bucket_rows(rows, 0, unit=unit)
    return corpus


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
        rate = run.learning_rate * t / warm if t < warm else cosine
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


def test_the_loss_is_the_one_of_the_slow_transcription() -> None:
    params = fresh()
    for tokens, mask in (SHORT, LONG):
        loss = summed_loss(params, CONFIG, jnp.asarray([tokens]), jnp.asarray([mask], bool))
        assert float(loss) == pytest.approx(slow_loss(params, tokens, mask), rel=1e-5)
    corpus = corpus_of(SHORT, LONG, unit=16)
    both = summed_loss(params, CONFIG, corpus.tokens, corpus.counts)
    expected = slow_loss(params, *SHORT) + slow_loss(params, *LONG)
    assert float(both) == pytest.approx(expected, rel=1e-5)


def test_padding_and_rows_of_padding_do_not_change_the_loss() -> None:
    params, corpus = fresh(), corpus_of(SHORT)
    alone = float(summed_loss(params, CONFIG, corpus.tokens, corpus.counts))
    for pad in (0, 9):
        tokens = jnp.full((3, 11), pad, jnp.int32).at[1, :5].set(corpus.tokens[0])
        counts = jnp.zeros((3, 11), bool).at[1, :5].set(corpus.counts[0])
        assert float(summed_loss(params, CONFIG, tokens, counts)) == pytest.approx(alone, rel=1e-5)


def test_the_first_token_is_never_predicted() -> None:
    params, (tokens, mask) = fresh(), SHORT
    losses = [
        float(summed_loss(params, CONFIG, jnp.asarray([tokens]), jnp.asarray([[first, *mask[1:]]])))
        for first in (False, True)
    ]
    assert losses[0] == losses[1] > 0


def test_training_is_adamw_on_the_mean_over_all_targets_of_all_buckets() -> None:
    run = TrainConfig(steps=8, batch_size=2, learning_rate=0.01, warmup=0.25, clip=0.5)
    start, losses = fresh(), []
    # Buckets of one row: every update holds both rows.
    corpora = [corpus_of(SHORT), corpus_of(LONG)]
    trained = train(start, CONFIG, corpora, run, lambda step, loss: losses.append((step, loss)))
    reference, slow_losses = slow_train(start, [SHORT, LONG], run)
    assert largest_change(start, reference) > 0.02
    assert_close(trained, reference, atol=1e-5)
    assert losses == [(8, pytest.approx(slow_losses[-1], rel=1e-4))]
    assert slow_losses[-1] < slow_losses[0]


def test_buckets_of_equal_rows_are_as_one() -> None:
    run = TrainConfig(steps=4, batch_size=4, learning_rate=0.01)
    one = train(fresh(), CONFIG, [corpus_of(LONG)], run)
    three = train(fresh(), CONFIG, [corpus_of(LONG, LONG), corpus_of(LONG), corpus_of(LONG)], run)
    assert largest_change(one, fresh()) > 0.01
    assert_close(one, three, atol=1e-5)


def test_rows_without_targets_do_not_change_the_training() -> None:
    blank = ([3] * 7, [0] * 7)
    run = TrainConfig(steps=4, batch_size=2, learning_rate=0.01)
    alone = train(fresh(), CONFIG, [corpus_of(LONG)], run)
    padded = train(fresh(), CONFIG, [corpus_of(LONG, unit=16), corpus_of(blank)], run)
    assert_close(alone, padded, atol=1e-5)


def test_rows_of_an_update_come_from_the_whole_bucket() -> None:
    # One text after another can only be learned if they are all drawn.
    rows = [([0, first, 11 - first, first], [0, 0, 1, 1]) for first in range(1, 11)]
    run = TrainConfig(steps=150, batch_size=16, learning_rate=0.02, weight_decay=0.0)
    trained = train(fresh(), CONFIG, [corpus_of(*rows)], run)
    losses = [slow_loss(trained, *row) / 2 for row in rows]
    assert max(losses) < 0.5 < math.log(12) < max(slow_loss(fresh(), *row) / 2 for row in rows) * 2


@pytest.mark.parametrize("steps", [0, 3])
def test_the_parameters_that_came_in_are_not_modified(steps: int) -> None:
    params = fresh()
    before = jax.tree.map(np.array, params)
    train(params, CONFIG, [corpus_of(LONG)], TrainConfig(steps=steps, batch_size=2))
    for kept, leaf in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), kept)


def test_a_seed_decides_the_run() -> None:
    corpus = corpus_of(*[([1, a, b, a], [1] * 4) for a in range(6) for b in range(6)])
    runs = [TrainConfig(steps=5, batch_size=2, learning_rate=0.01, seed=s) for s in (1, 1, 2)]
    one, same, other = (train(fresh(), CONFIG, [corpus], run) for run in runs)
    assert largest_change(one, same) == 0
    assert largest_change(one, other) > 1e-4


def test_the_run_does_not_depend_on_how_often_it_reports(monkeypatch: Any) -> None:
    corpus = corpus_of(*[([1, a, b, a], [1] * 4) for a in range(4) for b in range(4)])
    run = TrainConfig(steps=7, batch_size=2, learning_rate=0.01, seed=5)
    whole, steps = train(fresh(), CONFIG, [corpus], run), []
    monkeypatch.setattr(sft, "_CHUNK", 3)
    pieces = train(fresh(), CONFIG, [corpus], run, lambda step, loss: steps.append(step))
    assert steps == [3, 6, 7]
    assert_close(whole, pieces, atol=1e-6)


def test_the_loss_is_compiled_once_for_full_chunks_and_once_for_the_rest(monkeypatch: Any) -> None:
    traces = []

    def counting(*args: Any) -> Any:
        traces.append(args[2].shape)
        return forward(*args)

    monkeypatch.setattr(sft, "forward", counting)
    run = TrainConfig(steps=34, batch_size=2, seed=77)
    train(fresh(), CONFIG, [corpus_of(LONG)], run)
    assert traces == [(2, 8)] * 2
    train(fresh(3), CONFIG, [corpus_of(LONG)], run)
    assert len(traces) == 2


def test_progress_is_reported_every_ten_steps_with_the_latest_loss() -> None:
    reports: list[tuple[int, float]] = []
    run = TrainConfig(steps=25, batch_size=1, learning_rate=0.02)
    train(fresh(), CONFIG, [corpus_of(LONG)], run, lambda *report: reports.append(report))
    assert [step for step, _ in reports] == [10, 20, 25]
    losses = [loss for _, loss in reports]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < slow_loss(fresh(), *LONG) / 8


def test_tree_and_dtypes_are_kept_in_bfloat16() -> None:
    config = LlamaConfig(**{**vars(CONFIG), "dtype": "bfloat16"})
    params = fresh(config=config)
    run = TrainConfig(steps=3, batch_size=2, learning_rate=0.05)
    trained = train(params, config, [corpus_of(LONG)], run)
    assert jax.tree.structure(trained) == jax.tree.structure(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("bfloat16")}
    assert largest_change(trained, params) > 0


def test_a_loss_that_is_not_a_number_is_an_error() -> None:
    params = fresh()
    params = params.replace(final_norm=params.final_norm.at[0].set(jnp.nan))
    run = TrainConfig(steps=12, batch_size=2, learning_rate=0.125)
    message = r"the loss is nan after step 10 of 12: lower learning_rate \(now 0.125\)"
    with pytest.raises(ValueError, match=message):
        train(params, CONFIG, [corpus_of(LONG)], run)


def test_an_empty_corpus_is_an_error() -> None:
    run = TrainConfig(steps=1, batch_size=2)
    empty = Corpus(tokens=jnp.zeros((0, 4), jnp.int32), counts=jnp.zeros((0, 4), bool))
    with pytest.raises(ValueError, match=r"at least one row each, found sizes \[\]"):
        train(fresh(), CONFIG, [], run)
    with pytest.raises(ValueError, match=r"at least one row each, found sizes \[1, 0\]"):
        train(fresh(), CONFIG, [corpus_of(LONG), empty], run)


SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=8)


@settings(deadline=None, max_examples=200)
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
