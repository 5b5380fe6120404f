"""The key-value cache and the programs over it: prefill, one decoding step, moving rows.

A row's prompt lies in its first slots; a generated token goes to a slot that is common to all rows,
so a step is a `dynamic_update_slice` and never a scatter. Which slots hold what is written down in
`KVCache.positions`, so that rows may begin at different times and slots be used again in any order.
Layers are a tuple here, not stacked: slicing a stacked cache or stacked weights would copy them at
every step.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from cycleqd_jax.models import kernels
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.llama import (
    attend,
    attention_inputs,
    layer_output,
    logits_of,
    rope_range,
    visible,
)
from cycleqd_jax.models.specs import LlamaParams

EMPTY = -1
_MASKED = float(jnp.finfo(jnp.float32).min) / 2


class KVCache(flax.struct.PyTreeNode):
    """`keys` (batch, kv_heads, d, slots) and `values` (batch, kv_heads, slots, d) of every layer.

    The two orientations are those in which both products of a decoding step read straight rows.
    `positions` (batch, slots) int32 is the position in its text of the token in each slot, `EMPTY`
    where there is none.
    """

    keys: Any
    values: Any
    positions: Any

    @property
    def slots(self) -> int:
        """Number of token slots that the cache holds."""
        return self.positions.shape[1]


def unstack_layers(params: LlamaParams) -> LlamaParams:
    """The same parameters with `layers` as a tuple, one `LayerParams` per layer."""
    if isinstance(params.layers, tuple):
        return params
    count = jax.tree.leaves(params.layers)[0].shape[0]
    layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], params.layers) for i in range(count))
    return params.replace(layers=layers)


def stack_layers(params: LlamaParams) -> LlamaParams:
    """What `unstack_layers` was given, as NumPy arrays: no device has to hold it twice."""
    layers = jax.tree.map(lambda *rows: np.stack(jax.device_get(rows)), *params.layers)
    return jax.device_get(params.replace(layers=layers))


def rows_of_layers(params: LlamaParams, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Unstacked parameters by leaf: as stacked ones, with a tuple of L arrays in place of a stack.

    Nothing is copied, so that one leaf at a time can be stacked or written. `is_leaf` as of
    `jax.tree.map`, for trees whose leaves are factors or kernels.
    """
    rows = jax.tree.map(lambda *layers: layers, *params.layers, is_leaf=is_leaf)
    return params.replace(layers=rows)


def prefill(
    params: LlamaParams,
    config: LlamaConfig,
    tokens: Int[Array, "batch time"],
    lengths: Int[Array, " batch"],
    rows: Int[Array, " batch"] | None,
    prefix: KVCache | None = None,
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Logits after each row's last token, and a cache with exactly the slots of the prompts.

    `params` has unstacked layers; `tokens` is padded on the right to the common length. With a
    `prefix`, a cache of `batch` rows without empty slots, the tokens are those after it and the
    result holds both.
    """
    before = 0 if prefix is None else prefix.slots
    index = jnp.arange(tokens.shape[1])
    at = before + index
    rope = rope_range(config, before, before + tokens.shape[1])
    mask = visible(config, at[:, None], jnp.arange(before + tokens.shape[1]))
    positions = jnp.where(index < lengths[:, None], at, EMPTY)
    x = kernels.embed(tokens, params.embed, rows)
    last = (lengths - 1)[:, None, None]
    keys, values = [], []
    for layer, weights in enumerate(params.layers):
        q, k, v = attention_inputs(x, weights, config, rope, rows)
        if prefix is not None:
            k = jnp.concatenate([prefix.keys[layer].transpose(0, 3, 1, 2), k], axis=1)
            v = jnp.concatenate([prefix.values[layer].transpose(0, 2, 1, 3), v], axis=1)
        keys.append(k.transpose(0, 2, 3, 1))
        values.append(v.transpose(0, 2, 1, 3))
        mixed = attend(q, k, v, mask)
        if layer == len(params.layers) - 1:
            # Only the last token's output is wanted: the top layer's MLP and the head run on it.
            x = jnp.take_along_axis(x, last, axis=1)
            mixed = jnp.take_along_axis(mixed, last, axis=1)
        x = layer_output(x, mixed, weights, config, rows)
    if prefix is not None:
        positions = jnp.concatenate([prefix.positions, positions], axis=1)
    logits = logits_of(x, params, config, rows)[:, 0]
    return logits, KVCache(tuple(keys), tuple(values), positions)


def decode_step(
    params: LlamaParams,
    config: LlamaConfig,
    token: Int[Array, " batch"],
    position: Int[Array, " batch"],
    rope: tuple[Array, Array],
    cache: KVCache,
    slot: Int[Array, ""],
    rows: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Feed one token per row into `slot` and return the logits after it.

    `position` is where the token stands in its text, `rope` are the tables there, (batch, 1, d/2):
    the caller makes them outside its loop, or every layer would compute sines for every head.
    """
    positions = lax.dynamic_update_slice(cache.positions, position[:, None], (0, slot))
    mask = (positions != EMPTY) & visible(config, position[:, None], positions)
    bias = jnp.where(mask, 0.0, _MASKED)
    x = kernels.embed(token[:, None], params.embed, rows)
    keys, values = [], []
    for layer, weights in enumerate(params.layers):
        q, k, v = attention_inputs(x, weights, config, rope, rows)
        k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        keys.append(lax.dynamic_update_slice(cache.keys[layer], k, (0, 0, 0, slot)))
        values.append(lax.dynamic_update_slice(cache.values[layer], v, (0, 0, slot, 0)))
        mixed = _attend_cache(q[:, 0], keys[-1], values[-1], bias)
        x = layer_output(x, mixed[:, None], weights, config, rows)
    logits = logits_of(x, params, config, rows)[:, 0]
    return logits, KVCache(tuple(keys), tuple(values), positions)


def reshape_cache(cache: KVCache, keep: Int[Array, " kept"], slots: int) -> KVCache:
    """The cache of the rows `keep`, with `slots` slots: empty ones are added, or the last cut."""
    room = max(slots - cache.slots, 0)

    def pick(leaf: Array, axis: int, empty: int = 0) -> Array:
        kept = lax.slice_in_dim(leaf[keep], 0, min(slots, cache.slots), axis=axis)
        widths = [(0, room if i == axis else 0) for i in range(leaf.ndim)]
        return jnp.pad(kept, widths, constant_values=empty)

    return KVCache(
        keys=tuple(pick(leaf, 3) for leaf in cache.keys),
        values=tuple(pick(leaf, 2) for leaf in cache.values),
        positions=pick(cache.positions, 1, EMPTY),
    )


def insert_rows(cache: KVCache, block: KVCache, places: Int[Array, " entering"]) -> KVCache:
    """Put the rows of `block` in place of the rows `places` of `cache`, which has more slots.

    Places beyond the batch are dropped: they pad the block to a common size.
    """
    width = block.slots

    positions = jnp.pad(block.positions, ((0, 0), (0, cache.slots - width)), constant_values=EMPTY)
    return KVCache(
        keys=tuple(
            leaf.at[places, :, :, :width].set(new, mode="drop")
            for leaf, new in zip(cache.keys, block.keys, strict=True)
        ),
        values=tuple(
            leaf.at[places, :, :width].set(new, mode="drop")
            for leaf, new in zip(cache.values, block.values, strict=True)
        ),
        positions=cache.positions.at[places].set(positions, mode="drop"),
    )


def _attend_cache(
    q: Float[Array, "batch heads d"],
    keys: Float[Array, "batch kv_heads d slots"],
    values: Float[Array, "batch kv_heads slots d"],
    bias: Float[Array, "batch slots"],
) -> Float[Array, "batch heads_d"]:
    """Softmax attention of one query per row; a group's query heads share their key head.

    The quotient of the softmax is taken after the product with the values: it has d numbers per
    head there, not one per slot. Its sum is a product too, which took three tenths off attention
    on a CPU; in full precision, or accelerators would round the weights.
    """
    batch, heads, d = q.shape
    kv_heads = keys.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, d)
    scores = jnp.einsum("bkgd,bkds->bkgs", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores * (d**-0.5) + bias[:, None, None]
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    ones = jnp.ones((weights.shape[-1], 1), weights.dtype)
    total = jnp.matmul(weights, ones, precision=lax.Precision.HIGHEST)
    mixed = jnp.einsum(
        "bkgs,bksd->bkgd",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    return (mixed / total).astype(q.dtype).reshape(batch, heads * d)
