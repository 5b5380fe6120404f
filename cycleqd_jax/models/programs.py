"""The compiled programs of decoding, and the state of a batch that they pass on.

Between two calls of `chunk` the host looks at what was generated; everything else stays on the
device. The programs name no collectives and no host callbacks: with sharded weights they compile
as they are, and a `Placement` says where the rows of a batch lie.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from cycleqd_jax.models import kernels
from cycleqd_jax.models.cache import (
    EMPTY,
    KVCache,
    decode_step,
    insert_rows,
    prefill,
    reshape_cache,
)
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.llama import rope_tables
from cycleqd_jax.models.sampling import Cuts, choose
from cycleqd_jax.models.specs import LlamaParams

STEPS = 8
"""Decoding steps of a chunk: the host looks at the texts this often."""

PREFILL_TOKENS = 1024
"""Tokens of one device that are prefilled at a time."""


class Rows(flax.struct.PyTreeNode):
    """The state of a batch, arrays (batch,): int32, `done` bool.

    `token` was chosen last and stands at `position` of its text; `left` more may follow. `count`
    tokens were generated so far, `seed` is the row's own.
    """

    token: Any
    position: Any
    left: Any
    count: Any
    done: Any
    candidate: Any
    seed: Any


class Prompts(flax.struct.PyTreeNode):
    """Rows that enter: `tokens` (batch, time), the rest (batch,), all int32.

    `lengths` counts the tokens after the prefix, `prefix` names each row's row of the prefix cache.
    """

    tokens: Any
    lengths: Any
    left: Any
    candidate: Any
    seed: Any
    prefix: Any


class Resumed(flax.struct.PyTreeNode):
    """Rows that go on after a text that ended in their place, arrays (batch,).

    Where `now` is True a row goes on with `token` at `position`; what was there is forgotten. Then
    come the tokens `forced` (STEPS, batch), -1 where the row speaks itself.
    """

    now: Any
    token: Any
    position: Any
    left: Any
    seed: Any
    forced: Any


@dataclass(frozen=True)
class Placement:
    """Where a batch lies on several devices; `sharding.batch_placement` makes it.

    `rows` is the sharding of arrays with the batch in front, `heads` that of keys and values,
    `parts` how many parts both cut the batch into. A batch that `parts` does not divide lies whole
    on every device.
    """

    rows: jax.sharding.Sharding
    heads: jax.sharding.Sharding
    parts: int

    def put(self, tree: Any) -> Any:
        """Constrain a `Rows`, `Prompts` or `KVCache` to its place, inside a compiled program."""
        heads = isinstance(tree, KVCache)

        def leaf(value: Array, sharding: Any) -> Array:
            if value.shape[0] % self.parts:
                return value
            return lax.with_sharding_constraint(value, sharding)

        places = jax.tree.map(lambda _: self.rows, tree)
        if heads:
            keys = (self.heads,) * len(tree.keys)
            places = KVCache(keys=keys, values=keys, positions=self.rows)
        return jax.tree.map(leaf, tree, places)


class Programs:
    """Compiles each program once per shape, however many threads ask; `traces` counts them.

    `parts` is how many devices a batch is split over.
    """

    def __init__(
        self,
        config: LlamaConfig,
        stop_tokens: Sequence[int],
        placement: Placement | None = None,
    ) -> None:
        self._config = config
        self.parts = 1 if placement is None else placement.parts
        self._put = (lambda tree: tree) if placement is None else placement.put
        self._is_stop = jnp.zeros(config.vocab_size, bool).at[jnp.array(stop_tokens, int)].set(True)
        self._lock = threading.Lock()
        self._compiled: set[Hashable] = set()
        self._jitted: dict[str, Any] = {}
        self.traces = 0
        self.prefix = self._program(self._prefix)
        self.enter = self._program(self._enter)
        self.chunk = self._program(self._chunk, donate_argnums=2)
        self.insert = self._program(self._insert, donate_argnums=(0, 1))
        self.repack = self._program(self._repack, static_argnums=3)
        self.build = self._program(kernels.materialise_candidate)

    def _program(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def traced(*args: Any) -> Any:
            self.traces += 1
            return function(*args)

        jitted = jax.jit(traced, **options)
        self._jitted[function.__name__.strip("_")] = jitted

        def call(*args: Any) -> Any:
            leaves, structure = jax.tree.flatten(args)
            # Static numbers are leaves without a shape: they stand in the key themselves.
            kinds = tuple((getattr(x, "shape", x), getattr(x, "dtype", None)) for x in leaves)
            key = (function, structure, kinds)
            if key in self._compiled:
                return jitted(*args)
            # A new shape is compiled by one thread while the others wait.
            with self._lock:
                result = jitted(*args)
                self._compiled.add(key)
            return result

        return call

    def lower(self, name: str, *args: Any) -> jax.stages.Lowered:
        """A program lowered for arrays or `jax.ShapeDtypeStruct`s, not run: "enter", "chunk"."""
        return self._jitted[name].lower(*args)

    def _prefix(self, weights: LlamaParams, tokens: Array, rows: Array) -> KVCache:
        """The cache of a prefix: `tokens` (candidates, prefix), without padding."""
        lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
        weights, numbers = _blocks(weights, rows)
        return prefill(weights, self._config, tokens, lengths, numbers)[1]

    def _enter(
        self, weights: LlamaParams, prompts: Prompts, prefix: KVCache | None, cuts: Cuts | None
    ) -> tuple[Array, Rows, KVCache]:
        """The first token of every row, the state and the cache after its prompt."""
        batch, width = prompts.tokens.shape
        prompts = self._put(prompts)
        parts = 1 if batch % self.parts else self.parts
        pieces = 1 if kernels.is_stacked(weights) else prefill_pieces(batch // parts, width)

        def piece(part: Prompts) -> tuple[Array, KVCache]:
            before = None
            if prefix is not None:
                before = jax.tree.map(lambda leaf: leaf[part.prefix], prefix)
            chosen, rows = _blocks(weights, part.candidate)
            return prefill(chosen, self._config, part.tokens, part.lengths, rows, before)

        # Pieces that fit the processor's cache: activations of a whole batch would not. Each has
        # rows of every part of the batch, so that no device waits.
        def cut(leaf: Array) -> Array:
            rows = leaf.reshape(parts, pieces, -1, *leaf.shape[1:])
            return rows.swapaxes(0, 1).reshape(pieces, -1, *leaf.shape[1:])

        def join(leaf: Array) -> Array:
            rows = leaf.reshape(pieces, parts, -1, *leaf.shape[2:])
            return rows.swapaxes(0, 1).reshape(batch, *leaf.shape[2:])

        logits, cache = jax.tree.map(join, lax.map(piece, jax.tree.map(cut, prompts)))
        cache = self._put(cache)
        before = 0 if prefix is None else prefix.slots
        state = Rows(
            token=jnp.zeros_like(prompts.lengths),
            position=before + prompts.lengths - 1,
            left=prompts.left,
            count=jnp.zeros_like(prompts.lengths),
            done=prompts.left <= 0,
            candidate=prompts.candidate,
            seed=prompts.seed,
        )
        emitted, state = self._emit(logits, self._put(state), cuts)
        return emitted, state, cache

    def _chunk(
        self,
        weights: LlamaParams,
        state: Rows,
        cache: KVCache,
        live: Array,
        slots: Array,
        cuts: Cuts | None,
        resumed: Resumed | None = None,
    ) -> tuple[Array, Rows, KVCache]:
        """Up to `STEPS` tokens for every row that is `live`, written to `slots` (STEPS,).

        Stops early when all rows are done. The tokens are (STEPS, batch), -1 in rows that are done
        and for those that were forced.
        """
        if resumed is not None:
            state, cache = _resume(state, cache, resumed)
        state = state.replace(done=state.done | ~live)
        weights = kernels.per_row(weights, state.candidate)
        out = jnp.full((STEPS, state.token.shape[0]), -1, jnp.int32)
        ahead = state.position + jnp.arange(STEPS)[:, None]
        ropes = rope_tables(self._config, ahead[..., None])

        def step(carry: tuple[Array, Array, Rows, KVCache]) -> tuple[Array, Array, Rows, KVCache]:
            i, out, state, cache = carry
            rope = jax.tree.map(lambda table: table[i], ropes)
            logits, cache = decode_step(
                weights, self._config, state.token, state.position, rope, cache, slots[i]
            )
            forced = None if resumed is None else resumed.forced[i]
            emitted, state = self._emit(logits, state, cuts, forced)
            return i + 1, out.at[i].set(emitted), state, cache

        def unfinished(carry: tuple[Array, Array, Rows, KVCache]) -> Array:
            return (carry[0] < STEPS) & ~carry[2].done.all()

        _, out, state, cache = lax.while_loop(unfinished, step, (jnp.int32(0), out, state, cache))
        return out, state, cache

    def _emit(
        self, logits: Array, state: Rows, cuts: Cuts | None, forced: Array | None = None
    ) -> tuple[Array, Rows]:
        """Choose the next token of every row; -1 in place of stop tokens and in finished rows.

        Where `forced` has a token, that one is next: the row has not spoken.
        """
        token = choose(logits, cuts, state.seed, state.count)
        speaks = jnp.ones_like(state.done) if forced is None else forced < 0
        stopped = state.done | (speaks & self._is_stop[token])
        left = state.left - speaks
        state = state.replace(
            token=token if forced is None else jnp.where(speaks, token, forced),
            position=state.position + 1,
            left=left,
            count=state.count + speaks,
            done=stopped | (left <= 0),
        )
        return jnp.where(stopped | ~speaks, -1, token), state

    def _insert(
        self, state: Rows, cache: KVCache, entering: Rows, block: KVCache, places: Array
    ) -> tuple[Rows, KVCache]:
        """Put entering rows in the place of finished ones."""
        state = jax.tree.map(lambda old, new: old.at[places].set(new, mode="drop"), state, entering)
        return self._put(state), self._put(insert_rows(cache, block, places))

    def _repack(self, state: Rows, cache: KVCache, keep: Array, slots: int) -> tuple[Rows, KVCache]:
        """The batch of the rows `keep`, with `slots` slots."""
        state = jax.tree.map(lambda leaf: leaf[keep], state)
        return self._put(state), self._put(reshape_cache(cache, keep, slots))


def _resume(state: Rows, cache: KVCache, resumed: Resumed) -> tuple[Rows, KVCache]:
    now = resumed.now
    state = state.replace(
        token=jnp.where(now, resumed.token, state.token),
        position=jnp.where(now, resumed.position, state.position),
        left=jnp.where(now, resumed.left, state.left),
        count=jnp.where(now, 0, state.count),
        done=state.done & ~now,
        seed=jnp.where(now, resumed.seed, state.seed),
    )
    gone = now[:, None] & (cache.positions >= resumed.position[:, None])
    return state, cache.replace(positions=jnp.where(gone, EMPTY, cache.positions))


def _blocks(weights: LlamaParams, rows: Array) -> tuple[LlamaParams, Array | None]:
    """Weights and row numbers for a batch; stacked weights have their rows in blocks instead."""
    if kernels.is_stacked(weights):
        return kernels.per_row(weights, rows), None
    return weights, rows


def prefill_pieces(rows: int, width: int) -> int:
    """Into how many equal parts a prefill is cut, so that each has about `PREFILL_TOKENS`."""
    pieces = 1
    while rows % (2 * pieces) == 0 and rows // pieces * width > PREFILL_TOKENS:
        pieces *= 2
    return pieces
