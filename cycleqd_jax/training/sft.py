"""Supervised training with optax: next-token cross entropy over the tokens that count.

Serves pretraining (packed documents, every token counts) and fine-tuning (conversations, only what
the assistant says counts). A run is a pure function of parameters, corpus and config.
"""

from collections.abc import Callable
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
# Rows whose activations live at once. Gradients of small batches are summed: on a CPU that is about
# 1.4 times faster than one large batch, whose activations leave the cache.
_MICROBATCH = 32


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        steps: number of updates.
        batch_size: rows per update (a multiple of 32, or at most 32).
        learning_rate: peak of the schedule (linear warm-up, cosine to a tenth).
        warmup: share of the steps spent warming up.
        weight_decay: decoupled decay of AdamW.
        clip: largest global norm of a gradient.
        seed: of the order of the rows.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 3e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0


@flax.struct.dataclass
class TrainState:
    """Parameters, the optimiser's state, the random key and the number of steps done."""

    params: Any
    optimiser: Any
    key: Any
    step: Any


def train(
    params: Any,
    config: LlamaConfig,
    corpus: Corpus,
    settings: TrainConfig,
    on_progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Any:
    """Train and return the new parameters (same tree, same dtypes).

    Args:
        params: parameters to start from; not modified.
        config: their architecture.
        corpus: the rows to learn from, drawn uniformly with replacement.
        settings: length, speed and seed of the run.
        on_progress: called after every few steps with the steps done and the latest loss.

    Raises:
        ValueError: the corpus is empty, or the loss became NaN or infinite (at which step).
    """
    if corpus.tokens.shape[0] == 0:
        raise ValueError("expected a corpus of at least one row, found none")
    optimiser = make_optimiser(settings)
    state = TrainState(
        params=params,
        optimiser=optimiser.init(params),
        key=jax.random.key(settings.seed),
        step=jnp.zeros((), jnp.int32),
    )
    done = 0
    while done < settings.steps:
        steps = min(_CHUNK, settings.steps - done)
        state, losses = _train_steps(state, corpus, config, settings, steps)
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
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=max(1, round(settings.warmup * settings.steps)),
        decay_steps=max(2, settings.steps),
        end_value=0.1 * settings.learning_rate,
    )
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=settings.weight_decay),
    )


def summed_loss(
    params: Any, config: LlamaConfig, tokens: Array, counts: Array
) -> Float[Array, ""]:
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


@partial(jax.jit, static_argnums=(2, 3, 4), donate_argnums=0)
def _train_steps(
    state: TrainState, corpus: Corpus, config: LlamaConfig, settings: TrainConfig, steps: int
) -> tuple[TrainState, Array]:
    optimiser = make_optimiser(settings)
    parts = max(1, settings.batch_size // _MICROBATCH)

    def step(state: TrainState, _: None) -> tuple[TrainState, Array]:
        key = jax.random.fold_in(state.key, state.step)
        rows = jax.random.randint(
            key, (parts, settings.batch_size // parts), 0, corpus.tokens.shape[0]
        )
        targets = jnp.maximum(jnp.sum(corpus.counts[rows][..., 1:]), 1)

        def part(gradient: Any, rows: Array) -> tuple[Any, Array]:
            loss, more = jax.value_and_grad(summed_loss)(
                state.params, config, corpus.tokens[rows], corpus.counts[rows]
            )
            return jax.tree.map(jnp.add, gradient, more), loss

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        gradient, losses = lax.scan(part, zeros, rows)
        gradient = jax.tree.map(lambda leaf: leaf / targets.astype(leaf.dtype), gradient)
        loss = jnp.sum(losses) / targets
        updates, optimiser_state = optimiser.update(gradient, state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(params=params, optimiser=optimiser_state, step=state.step + 1), loss

    return lax.scan(step, state, None, length=steps)
