"""Greedy decoding of many prompts of many candidates.

Rows are sorted by length and cut into batches. A batch is prefilled, then decoded in compiled
chunks of a few steps; between chunks the rows that finished leave it, the survivors move into a
smaller batch and the cache grows only as far as it is filled. All shapes come from short lists of
buckets, so that a whole run compiles a handful of programs.
"""

import os
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from cycleqd_jax.models import kernels
from cycleqd_jax.models.cache import (
    KVCache,
    decode_step,
    prefill,
    reshape_cache,
    unstack_layers,
)
from cycleqd_jax.models.specs import LlamaConfig, LlamaParams

_STEPS = 8
_PROMPT_UNIT = 16
_SLOT_UNIT = 32
_SMALLEST_BATCH = 16
_PREFILL_TOKENS = 1024
_HALF_STEPS_FROM = 64
# Processor time of rows over that of building each candidate, at width 128 with 96 prompts per
# candidate: 0.9 at a share of 0.27, 1.4 at 1.1, 2.6 at 4.3. The threshold lies between; it was not
# measured itself.
_ROWS_PER_CANDIDATE = 16
_DEAR_SPECTRAL_SHARE = 0.4

MODES = ("auto", "rows", "candidates")


@dataclass(frozen=True)
class _Job:
    """Prompts that are decoded in one batch, with the candidate to build or None."""

    candidate: int | None
    rows: list[int]


@dataclass(frozen=True)
class DecodeStats:
    """What decoding did: prompts and tokens counted without padding, seconds of wall time."""

    prompts: int = 0
    prefill_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: "DecodeStats") -> "DecodeStats":
        return DecodeStats(
            self.prompts + other.prompts,
            self.prefill_tokens + other.prefill_tokens,
            self.generated_tokens + other.generated_tokens,
            self.seconds + other.seconds,
        )

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, prefill time included."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0


class _Rows(flax.struct.PyTreeNode):
    """The state of a batch: arrays (batch,) and two scalars, all int32 but `done`."""

    token: Any
    lengths: Any
    left: Any
    done: Any
    candidate: Any
    prompt_slots: Any
    slot: Any


class Decoder:
    """Decodes prompts greedily, each row with its own candidate's weights.

    Keep one instance for a whole run: it owns the compiled programs, and new gains or weights of
    the same shapes reuse them (`traces` counts the compilations). `stop_tokens` end an answer and
    are not part of it. Answers are also cut at `max_new_tokens` and where the context of
    `config.max_positions` is full. Results do not depend on what else is decoded in the same call,
    up to the rounding of matrix products, nor on `mode`:

    - "rows": rows of all candidates share batches, W(g) is never built. Reads the weights once for
      the population: right where reading weights is what takes the time (accelerators, big models,
      few prompts per candidate).
    - "candidates": one candidate after the other, its W(g) built on the fly and dropped. Fewest
      arithmetic operations once a candidate has more tokens than W has rows: right for a CPU.
    - "auto": "candidates" on a CPU where the low-rank products of "rows" would cost a notable share
      of the dense ones and every candidate has enough prompts to fill its own batches; else "rows".

    `workers` batches are decoded at the same time (default: one per core on a CPU, else one), since
    the small products of a decoding step leave a second core partly idle.
    """

    def __init__(
        self,
        params: LlamaParams | None,
        config: LlamaConfig,
        *,
        stop_tokens: Sequence[int],
        pad_token: int,
        max_new_tokens: int = 48,
        max_rows: int = 256,
        mode: str = "auto",
        workers: int | None = None,
    ) -> None:
        for token in (*stop_tokens, pad_token):
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    "Decoder: expected stop and pad tokens "
                    f"in [0, {config.vocab_size}), got {token}"
                )
        if max_new_tokens < 1 or max_rows < 1:
            raise ValueError(
                "Decoder: expected max_new_tokens and max_rows of at least 1, "
                f"got {max_new_tokens} and {max_rows}"
            )
        if mode not in MODES:
            raise ValueError(f"Decoder: expected a mode of {MODES}, got {mode!r}")
        self.config = config
        self.traces = 0
        self.stats = DecodeStats()
        self._params = None if params is None else unstack_layers(params)
        self._pad = pad_token
        self._max_new = max_new_tokens
        self._buckets = _row_buckets(max_rows)
        self._mode = mode
        self._workers = workers or (_cores() if jax.default_backend() == "cpu" else 1)
        self._is_stop = jnp.zeros(config.vocab_size, bool).at[jnp.array(stop_tokens, int)].set(True)
        self._lock = threading.Lock()
        self._compiled: set[Hashable] = set()
        self._prefill = jax.jit(self._prefill_program, static_argnames="slots")
        self._chunk = jax.jit(self._chunk_program, donate_argnames="cache")
        self._repack = jax.jit(self._repack_program, static_argnames="slots")
        self._build = jax.jit(self._build_program)

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[int] | None = None,
        params: LlamaParams | None = None,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """The answers to `prompts`, in their order, as lists of token ids.

        `candidates` gives the candidate of every prompt where `params` (or the parameters of the
        constructor) hold kernels of a population; None, or zeros, with plain weights.
        `on_finished` is called with the number of prompts done since its last call. Raises
        ValueError for an empty prompt, one that leaves no room for a token, and candidates that do
        not exist.
        """
        weights = self._params if params is None else unstack_layers(params)
        if weights is None:
            raise ValueError("Decoder.decode: expected params here or in the constructor, got none")
        self._check(prompts, candidates, weights)
        start = time.perf_counter()
        answers: list[list[int]] = [[] for _ in prompts]
        jobs = self._plan(prompts, candidates, weights)

        def play(job: _Job) -> tuple[list[int], list[list[int]]]:
            chosen = weights
            if job.candidate is not None:
                chosen = self._run("build", self._build, (weights, jnp.int32(job.candidate)))
            rows = [0 if candidates is None else candidates[i] for i in job.rows]
            return job.rows, self._decode_batch([prompts[i] for i in job.rows], rows, chosen)

        with ThreadPoolExecutor(self._workers) as pool:
            for rows, texts in pool.map(play, jobs):
                for i, text in zip(rows, texts, strict=True):
                    answers[i] = text
                if on_finished is not None:
                    on_finished(len(rows))
        self.stats += DecodeStats(
            prompts=len(prompts),
            prefill_tokens=sum(map(len, prompts)),
            generated_tokens=sum(map(len, answers)),
            seconds=time.perf_counter() - start,
        )
        return answers

    def _plan(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[int] | None,
        weights: LlamaParams,
    ) -> list["_Job"]:
        """Cut the prompts into batches of similar lengths."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = self._buckets[-1]
        present = sorted(set(candidates or ()))
        mode = self._mode
        if mode == "auto":
            enough = len(prompts) >= _ROWS_PER_CANDIDATE * len(present)
            dear = kernels.spectral_share(weights) > _DEAR_SPECTRAL_SHARE
            build = jax.default_backend() == "cpu" and enough and dear
            mode = "candidates" if build else "rows"
        if candidates is None or kernels.num_candidates(weights) is None or mode == "rows":
            return [_Job(None, order[i : i + size]) for i in range(0, len(order), size)]
        jobs = []
        for candidate in present:
            own = [i for i in order if candidates[i] == candidate]
            jobs += [_Job(candidate, own[i : i + size]) for i in range(0, len(own), size)]
        return jobs

    def _run(self, name: str, program: Callable[..., Any], args: tuple, **static: int) -> Any:
        """Call a compiled program; a new shape is compiled by one thread while others wait."""
        leaves, structure = jax.tree.flatten(args)
        key = (name, structure, tuple(jnp.shape(leaf) for leaf in leaves), *static.items())
        if key in self._compiled:
            return program(*args, **static)
        with self._lock:
            result = program(*args, **static)
            self._compiled.add(key)
        return result

    def _decode_batch(
        self, prompts: list[Sequence[int]], candidates: list[int], weights: LlamaParams
    ) -> list[list[int]]:
        """Decode one batch of at most the largest bucket's rows."""
        count, limit = len(prompts), self.config.max_positions
        size = _bucket(count, self._buckets)
        width = min(_round_up(max(map(len, prompts)), _PROMPT_UNIT), limit)
        tokens = np.full((size, width), self._pad, np.int32)
        lengths = np.ones(size, np.int32)
        left = np.zeros(size, np.int32)
        candidate = np.zeros(size, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
            left[row] = min(self._max_new, limit - len(prompt))
        candidate[:count] = candidates
        text = np.full((count, self._max_new + _STEPS), -1, np.int32)
        slots = _round_up(width + _STEPS, _SLOT_UNIT)
        start = (weights, tokens, lengths, left, candidate)
        first, state, cache = self._run("prefill", self._prefill, start, slots=slots)
        text[:, 0] = np.asarray(first)[:count]
        row_of = np.arange(size)
        done, produced = np.asarray(state.done), 1
        while not done.all():
            alive = np.flatnonzero(~done)
            smaller = _bucket(len(alive), self._buckets)
            needed = width + produced - 1 + _STEPS
            if smaller < len(row_of) or needed > slots:
                slots = max(slots, _round_up(needed, _SLOT_UNIT))
                # Finished rows fill the bucket up; they stay finished.
                keep = np.concatenate([alive, np.flatnonzero(done)])[:smaller]
                state, cache = self._run("repack", self._repack, (state, cache, keep), slots=slots)
                row_of = row_of[keep]
            out, state, cache = self._run("chunk", self._chunk, (weights, state, cache))
            real = row_of < count
            text[row_of[real], produced : produced + _STEPS] = np.asarray(out).T[real]
            done, produced = np.asarray(state.done), produced + _STEPS
        return [row[row >= 0].tolist() for row in text]

    def _build_program(self, weights: LlamaParams, candidate: Array) -> LlamaParams:
        self.traces += 1
        return kernels.materialise_candidate(weights, candidate)

    def _prefill_program(
        self,
        weights: LlamaParams,
        tokens: Array,
        lengths: Array,
        left: Array,
        candidate: Array,
        *,
        slots: int,
    ) -> tuple[Array, _Rows, KVCache]:
        self.traces += 1
        pieces = _pieces(*tokens.shape)

        def piece(part: tuple[Array, Array, Array]) -> tuple[Array, KVCache]:
            return prefill(weights, self.config, *part, slots=slots)

        # Pieces that fit the processor's cache: activations of a whole batch would not.
        parts = jax.tree.map(
            lambda leaf: leaf.reshape(pieces, -1, *leaf.shape[1:]), (tokens, lengths, candidate)
        )
        logits, cache = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), lax.map(piece, parts)
        )
        width = jnp.int32(tokens.shape[1])
        state = _Rows(
            token=jnp.zeros_like(lengths),
            lengths=lengths,
            left=left,
            done=left <= 0,
            candidate=candidate,
            prompt_slots=width,
            slot=width,
        )
        emitted, state = self._emit(logits, state)
        return emitted, state, cache

    def _chunk_program(
        self, weights: LlamaParams, state: _Rows, cache: KVCache
    ) -> tuple[Array, _Rows, KVCache]:
        """Up to `_STEPS` tokens for every row; stops early when all rows are done."""
        self.traces += 1
        weights = kernels.per_row(weights, state.candidate)
        out = jnp.full((_STEPS, state.token.shape[0]), -1, jnp.int32)

        def step(carry: tuple[Array, Array, _Rows, KVCache]) -> tuple[Array, Array, _Rows, KVCache]:
            i, out, state, cache = carry
            logits, cache = decode_step(
                weights,
                self.config,
                state.token,
                cache,
                lengths=state.lengths,
                prompt_slots=state.prompt_slots,
                slot=state.slot,
            )
            emitted, state = self._emit(logits, state.replace(slot=state.slot + 1))
            return i + 1, out.at[i].set(emitted), state, cache

        def unfinished(carry: tuple[Array, Array, _Rows, KVCache]) -> Array:
            return (carry[0] < _STEPS) & ~carry[2].done.all()

        _, out, state, cache = lax.while_loop(unfinished, step, (jnp.int32(0), out, state, cache))
        return out, state, cache

    def _repack_program(
        self, state: _Rows, cache: KVCache, keep: Array, *, slots: int
    ) -> tuple[_Rows, KVCache]:
        self.traces += 1
        state = jax.tree.map(lambda leaf: leaf[keep] if leaf.ndim else leaf, state)
        return state, reshape_cache(cache, keep, slots)

    def _emit(self, logits: Array, state: _Rows) -> tuple[Array, _Rows]:
        """Choose the next token of every row; -1 in place of stop tokens and in finished rows."""
        # Two plain reductions: XLA's CPU backend does not vectorise an argmax.
        best = logits.max(axis=-1, keepdims=True)
        index = jnp.arange(logits.shape[-1], dtype=jnp.int32)
        token = jnp.min(jnp.where(logits == best, index, index[-1]), axis=-1)
        stopped = state.done | self._is_stop[token]
        left = state.left - 1
        emitted = jnp.where(stopped, -1, token)
        return emitted, state.replace(token=token, left=left, done=stopped | (left <= 0))

    def _check(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[int] | None,
        weights: LlamaParams,
    ) -> None:
        limit = self.config.max_positions
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < limit:
                raise ValueError(
                    f"prompt {i}: expected 1 to {limit - 1} tokens, since max_positions is "
                    f"{limit}, found {len(prompt)}"
                )
        population = kernels.num_candidates(weights)
        if population is None:
            if candidates is None:
                return
            population = 1
        if candidates is None or len(candidates) != len(prompts):
            found = "none" if candidates is None else str(len(candidates))
            raise ValueError(
                f"Decoder.decode: expected one candidate per prompt ({len(prompts)}), found {found}"
            )
        for i, candidate in enumerate(candidates):
            if not 0 <= candidate < population:
                raise ValueError(
                    f"prompt {i}: expected a candidate in [0, {population}), found {candidate}"
                )


def _row_buckets(max_rows: int) -> tuple[int, ...]:
    """Batch sizes up to `max_rows`: powers of two, and their sums in pairs where that is much."""
    sizes = [_SMALLEST_BATCH]
    while sizes[-1] < max_rows:
        last = sizes[-1]
        power = last & (last - 1) == 0
        sizes.append(last * 3 // 2 if power and last >= _HALF_STEPS_FROM else _power_above(last))
    return (*(size for size in sizes if size < max_rows), max_rows)


def _power_above(value: int) -> int:
    return 1 << value.bit_length()


def _pieces(rows: int, width: int) -> int:
    """Into how many equal parts a prefill is cut, so that each has about `_PREFILL_TOKENS`."""
    pieces = 1
    while rows % (2 * pieces) == 0 and rows // pieces * width > _PREFILL_TOKENS:
        pieces *= 2
    return pieces


def _bucket(count: int, buckets: Sequence[int]) -> int:
    return next(size for size in buckets if size >= count)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
