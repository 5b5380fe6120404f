"""Supervised training with optax: next-token cross entropy over the tokens that count.

Serves pretraining (documents, every token counts) and fine-tuning (conversations, only what the
assistant says counts). A run is a pure function of parameters, corpus and config.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from cycleqd_jax.models.llama import forward
from cycleqd_jax.models.specs import LlamaConfig
from cycleqd_jax.training.corpus import Corpus

# Steps inside one compiled call: long enough to hide dispatch, short enough to show progress.
_CHUNK = 10


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        steps: number of updates.
        batch_size: rows per update. Small batches (32) suit a CPU: larger activations leave its
            cache, and a small model gains more from more updates.
        learning_rate: peak of the schedule (linear warm-up, cosine to a tenth).
        warmup: share of the steps spent warming up.
        weight_decay: decoupled decay of AdamW.
        clip: largest global norm of a gradient.
        seed: of the order of the rows.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0


class TrainState(flax.struct.PyTreeNode):
    """Parameters, the optimiser's state, the random key and the number of steps done."""

    params: Any
    optimiser: Any
    key: Any
    step: Any


def train(
    params: Any,
    config: LlamaConfig,
    corpora: Sequence[Corpus],
    settings: TrainConfig,
    on_progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Any:
    """Train and return the new parameters (same tree, same dtypes).

    Args:
        params: parameters to start from; not modified.
        config: their architecture.
        corpora: the rows to learn from, in buckets of equal length; every update draws rows of
            every bucket, uniformly and with replacement, in proportion to the buckets' sizes.
        settings: length, speed and seed of the run.
        on_progress: called after every few steps with the steps done and the latest loss.

    Raises:
        ValueError: the corpus is empty, or the loss became NaN or infinite (at which step).
    """
    shares = rows_per_update([corpus.tokens.shape[0] for corpus in corpora], settings.batch_size)
    optimiser = make_optimiser(settings)
    params = jax.tree.map(jnp.array, params)  # a copy: every step gives its buffers to the next
    state = TrainState(
        params=params,
        optimiser=optimiser.init(params),
        key=jax.random.key(settings.seed),
        step=jnp.zeros((), jnp.int32),
    )
    done = 0
    while done < settings.steps:
        steps = min(_CHUNK, settings.steps - done)
        state, losses = _train_steps(state, tuple(corpora), config, settings, shares, steps)
        done += steps
        loss = float(losses[-1])
        if not jnp.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} after step {done} of {settings.steps}: "
                f"lower learning_rate (now {settings.learning_rate}) or check the corpus"
            )
        on_progress(done, loss)
    return state.params


def make_optimiser(settings: TrainConfig) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay and clipping."""
    warmup = max(1, round(settings.warmup * settings.steps))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=settings.learning_rate / warmup,  # from 0 the first update would do nothing
        peak_value=settings.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(2, settings.steps),
        end_value=0.1 * settings.learning_rate,
    )
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=settings.weight_decay),
    )


def summed_loss(params: Any, config: LlamaConfig, tokens: Array, counts: Array) -> Float[Array, ""]:
    """Sum of the negative log likelihood of the tokens that count, each given those before it.

    Args:
        params: parameters of ``config``.
        config: the architecture.
        tokens: (batch, time) token ids.
        counts: (batch, time) True where the token is to be predicted (never at time 0).
    """
    logits = forward(params, config, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(losses, where=counts[:, 1:])


def rows_per_update(sizes: Sequence[int], batch_size: int) -> tuple[int, ...]:
    """Share out the rows of an update over buckets: in proportion to size, at least one each.

    Raises:
        ValueError: no bucket, an empty one, or more buckets than rows.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"expected buckets of at least one row each, found sizes {list(sizes)}")
    if len(sizes) > batch_size:
        raise ValueError(
            f"expected a batch of at least {len(sizes)} rows, one a bucket, found {batch_size}"
        )
    exact = [batch_size * size / sum(sizes) for size in sizes]
    shares = [max(1, int(share)) for share in exact]
    while sum(shares) != batch_size:
        step = 1 if sum(shares) < batch_size else -1
        gaps = [
            step * (wanted - share) if share + step >= 1 else -float("inf")
            for wanted, share in zip(exact, shares, strict=True)
        ]
        shares[gaps.index(max(gaps))] += step
    return tuple(shares)


@partial(jax.jit, static_argnums=(2, 3, 4, 5), donate_argnums=0)
def _train_steps(
    state: TrainState,
    corpora: tuple[Corpus, ...],
    config: LlamaConfig,
    settings: TrainConfig,
    shares: tuple[int, ...],
    steps: int,
) -> tuple[TrainState, Array]:
    optimiser = make_optimiser(settings)

    def step(state: TrainState, _: None) -> tuple[TrainState, Array]:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), len(corpora))
        gradient = jax.tree.map(jnp.zeros_like, state.params)
        loss, targets = jnp.zeros(()), jnp.zeros(())
        for key, corpus, share in zip(keys, corpora, shares, strict=True):
            rows = jax.random.randint(key, (share,), 0, corpus.tokens.shape[0])
            tokens, counts = corpus.tokens[rows], corpus.counts[rows]
            more, part = jax.value_and_grad(summed_loss)(state.params, config, tokens, counts)
            gradient = jax.tree.map(jnp.add, gradient, part)
            loss, targets = loss + more, targets + jnp.sum(counts[:, 1:])
        targets = jnp.maximum(targets, 1)
        gradient = jax.tree.map(lambda leaf: leaf / targets.astype(leaf.dtype), gradient)
        updates, optimiser_state = optimiser.update(gradient, state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(params=params, optimiser=optimiser_state, step=state.step + 1)
        return state, loss / targets

    return lax.scan(step, state, None, length=steps)
