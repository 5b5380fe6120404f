"""Log-likelihoods of texts under many candidates, all texts in packed rows (`models.packing`)."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cycleqd_jax.models import kernels
from cycleqd_jax.models.cache import unstack_layers
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.llama import (
    attend,
    attention_inputs,
    layer_output,
    logits_of,
    rope_tables,
    visible,
)
from cycleqd_jax.models.packing import Batch, Packed, Pair, pack
from cycleqd_jax.models.sampling import greedy
from cycleqd_jax.models.specs import LlamaParams

MODES = ("rows", "candidates")
# Tokens of a batch: activations that stay in a processor's cache, or that fill an accelerator.
_TOKENS_CPU, _TOKENS_DEVICE = 2048, 16384
# Queries whose scores over all keys exist at a time.
_QUERIES = 512
# Logits that exist at a time: 64 MB.
_LOGITS = 1 << 24


@dataclass(frozen=True)
class Likelihoods:
    """What every candidate makes of every continuation.

    Attributes:
        log_probability: natural logarithm, summed over the continuation's tokens.
        greedy: whether greedy decoding after the context would give the continuation.
    """

    log_probability: Float[np.ndarray, "candidates texts"]
    greedy: Bool[np.ndarray, "candidates texts"]


class Scorer:
    """Scores texts under one model or under every candidate of a population at once.

    Keep one instance: it owns the compiled programs, one per shape, and new gains or weights of the
    same shapes reuse them (`traces` counts the compilations). What texts have in common at their
    beginning is computed once a row, whatever the task calls it: examples, question, passage.
    Logits are float32 whatever the weights are; never more than a slice of them exists.

    Args:
        config: the model's.
        mode: "rows" runs all candidates in one batch on their shared weights; "candidates" builds
            the weights of one after the other, which costs fewer operations but fills its batches
            worse (0.66 of the rate of "rows" at 160 requests of 8 candidates).
        max_tokens: tokens of a batch, all candidates together (default: by the kind of device).
        workers: batches that run at the same time (default: one a core on a CPU, else one).

    Raises:
        ValueError: no such mode, or a number below 1.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        mode: str = "rows",
        max_tokens: int | None = None,
        workers: int | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"Scorer: expected a mode of {MODES}, found {mode!r}")
        for name, value in (("max_tokens", max_tokens), ("workers", workers)):
            if value is not None and value < 1:
                raise ValueError(f"Scorer: expected {name} of at least 1, found {value}")
        cpu = jax.default_backend() == "cpu"
        self.config = config
        self.traces = 0
        self._mode = mode
        self._budget = max_tokens or (_TOKENS_CPU if cpu else _TOKENS_DEVICE)
        self._workers = workers or (len(os.sched_getaffinity(0)) if cpu else 1)
        self._compiled: set[Any] = set()
        self._run = jax.jit(self._traced)
        self._build = jax.jit(kernels.materialise_candidate)

    def score(
        self,
        pairs: Sequence[Pair],
        params: LlamaParams,
        on_progress: Callable[[float], None] = lambda share: None,
    ) -> Likelihoods:
        """Score every continuation after its context, in every candidate of `params`.

        Args:
            pairs: token ids of context and continuation, at least one each.
            params: plain weights (one candidate), or kernels of a population (`kernels.attach`,
                `kernels.stack`).
            on_progress: called with the share of the work that is done, from any thread but once at
                a time.

        Raises:
            ValueError: an empty context or continuation, tokens outside the vocabulary, or a text
                longer than `config.max_positions` (the last token is not read).
        """
        self._check(pairs)
        params = unstack_layers(params)
        count = kernels.num_candidates(params) or 1
        shape = (count, len(pairs))
        found = Likelihoods(np.zeros(shape), np.ones(shape, bool))
        if not pairs:
            return found
        plain = kernels.is_stacked(params) or kernels.num_candidates(params) is None
        apart = self._mode == "candidates" and not plain
        budget = self._budget // (1 if apart else count)
        batches = pack(pairs, self.config.max_positions, budget)
        done, lock = 0, threading.Lock()

        def finished() -> None:
            nonlocal done
            with lock:
                done += 1
                on_progress(done / (len(batches) * (count if apart else 1)))

        if not apart:
            self._score(params, batches, found, 0, finished)
            return found
        for candidate in range(count):
            built = self._build(params, jnp.int32(candidate))
            self._score(built, batches, found, candidate, finished)
        return found

    def _score(
        self,
        params: LlamaParams,
        batches: Sequence[Batch],
        found: Likelihoods,
        first: int,
        finished: Callable[[], None],
    ) -> None:
        """Run the batches; their candidates' results go to `found` from row `first` on."""

        def run(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
            result = jax.device_get(self._run(params, batch.packed))
            finished()
            return result

        # A new shape is compiled by this thread, so that no two threads compile the same.
        leaves, structure = jax.tree.flatten(params)
        weights = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        results: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for i, batch in enumerate(batches):
            kind = (*weights, batch.owner.shape, batch.packed.tokens.shape)
            if kind not in self._compiled:
                results[i] = run(batch)
                self._compiled.add(kind)
        rest = [i for i in range(len(batches)) if i not in results]
        with ThreadPoolExecutor(self._workers) as pool:
            results |= zip(rest, pool.map(run, [batches[i] for i in rest]), strict=True)
        for i, batch in enumerate(batches):
            real = batch.owner >= 0
            owner = batch.owner[real]
            for row, (values, likeliest) in enumerate(zip(*results[i], strict=True), first):
                np.add.at(found.log_probability[row], owner, values[real].astype(np.float64))
                np.logical_and.at(found.greedy[row], owner, likeliest[real])

    def _traced(self, params: LlamaParams, packed: Packed) -> tuple[Array, Array]:
        self.traces += 1
        return score_packed(params, self.config, packed)

    def _check(self, pairs: Sequence[Pair]) -> None:
        limit, vocab = self.config.max_positions, self.config.vocab_size
        for i, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                raise ValueError(
                    f"text {i}: expected at least one token of context and one of continuation, "
                    f"found {len(context)} and {len(continuation)}"
                )
            length = len(context) + len(continuation) - 1
            if length > limit:
                raise ValueError(
                    f"text {i}: expected at most {limit} tokens to read, since max_positions is "
                    f"{limit}, found {length}: cut its context from the left"
                )
            if min(*context, *continuation) < 0 or max(*context, *continuation) >= vocab:
                raise ValueError(f"text {i}: expected token ids in [0, {vocab})")


def score_packed(
    params: LlamaParams, config: LlamaConfig, packed: Packed
) -> tuple[Float[Array, "candidates rows scored"], Bool[Array, "candidates rows scored"]]:
    """Log-probability of every target in every candidate, and whether it is the likeliest token.

    `params` has unstacked layers. Of equally likely tokens the first counts as the likeliest.
    """
    count = kernels.num_candidates(params) or 1
    rows, width = packed.tokens.shape
    # Candidate after candidate: blocks of equal rows, which stacked weights ask for.
    params = kernels.per_row(params, jnp.repeat(jnp.arange(count), rows))
    packed = jax.tree.map(lambda leaf: jnp.tile(leaf, (count, 1)), packed)
    rope = rope_tables(config, packed.positions)
    every = jnp.broadcast_to(jnp.arange(width), packed.tokens.shape)
    x = kernels.embed(packed.tokens, params.embed)
    for layer, weights in enumerate(params.layers):
        q, k, v = attention_inputs(x, weights, config, rope, None)
        if layer < len(params.layers) - 1:
            mixed = _attend(q, k, v, every, packed, config)
        else:
            # Above the top layer's keys and values only the scored tokens are wanted.
            x = jnp.take_along_axis(x, packed.slot[..., None], axis=1)
            q = jnp.take_along_axis(q, packed.slot[..., None, None], axis=1)
            mixed = _attend(q, k, v, packed.slot, packed, config)
        x = layer_output(x, mixed, weights, config, None)
    values, likeliest = _of_targets(x, packed.target, params, config)
    return values.reshape(count, rows, -1), likeliest.reshape(count, rows, -1)


def _attend(
    q: Float[Array, "batch time heads d"],
    k: Float[Array, "batch width kv_heads d"],
    v: Float[Array, "batch width kv_heads d"],
    slots: Int[Array, "batch time"],
    packed: Packed,
    config: LlamaConfig,
) -> Float[Array, "batch time heads_d"]:
    """Attention of the queries in `slots` to the tokens of their own texts, block by block."""
    keys = jnp.arange(k.shape[1])
    places = jnp.take_along_axis(packed.positions, slots, axis=1)

    def block(part: tuple[Array, Array, Array]) -> Array:
        queries, at, place = part
        mask = (keys <= at[..., None]) & (at[..., None] < packed.end[:, None])
        mask &= visible(config, place[..., None], packed.positions[:, None])
        return attend(queries, k, v, mask[:, None, None])

    return _in_parts(block, (q, slots, places), _QUERIES)


def _of_targets(
    x: Float[Array, "batch scored hidden"],
    targets: Int[Array, "batch scored"],
    params: LlamaParams,
    config: LlamaConfig,
) -> tuple[Float[Array, "batch scored"], Bool[Array, "batch scored"]]:
    """Log-softmax at the targets, in float32, a slice of the logits at a time."""

    def part(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, target = inputs
        logits = logits_of(hidden, params, config, None)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        best = greedy(logits.reshape(-1, logits.shape[-1])).reshape(target.shape)
        return chosen - jax.nn.logsumexp(logits, axis=-1), best == target

    size = max(1, _LOGITS // (x.shape[0] * config.vocab_size))
    return _in_parts(part, (x, targets), size)


def _in_parts(function: Any, inputs: Any, most: int) -> Any:
    """A function of arrays (batch, time, ...) on slices of `most` of a power of two of times."""
    time = jax.tree.leaves(inputs)[0].shape[1]
    parts = 1
    while time // parts > most and time % (2 * parts) == 0:
        parts *= 2
    if parts == 1:
        return function(inputs)

    def cut(leaf: Array) -> Array:
        return leaf.reshape(leaf.shape[0], parts, -1, *leaf.shape[2:]).swapaxes(0, 1)

    def join(leaf: Array) -> Array:
        return leaf.swapaxes(0, 1).reshape(leaf.shape[1], -1, *leaf.shape[3:])

    return jax.tree.map(join, lax.map(function, jax.tree.map(cut, inputs)))
