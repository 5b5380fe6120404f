"""The key-value cache and the two programs that use it: prefill and one decoding step.

Every row's prompt starts at slot 0 and is padded on the right; generated tokens of all rows go to
one common slot, so a step is a `dynamic_update_slice` and never a scatter. A row sees its own
prompt's slots and the generated ones, at its true positions. Layers are a tuple here, not stacked:
slicing a stacked cache or stacked weights would copy them at every step.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from cycleqd_jax.models import kernels
from cycleqd_jax.models.llama import (
    attend,
    attention_inputs,
    layer_output,
    logits_of,
    rope_tables,
    visible,
)
from cycleqd_jax.models.specs import LlamaConfig, LlamaParams


class KVCache(flax.struct.PyTreeNode):
    """`keys` (batch, kv_heads, d, slots) and `values` (batch, kv_heads, slots, d) of every layer.

    The two orientations are those in which both products of a decoding step read straight rows.
    """

    keys: Any
    values: Any

    @property
    def slots(self) -> int:
        """Number of token slots that the cache holds."""
        return self.values[0].shape[2]


def unstack_layers(params: LlamaParams) -> LlamaParams:
    """The same parameters with `layers` as a tuple, one `LayerParams` per layer."""
    if isinstance(params.layers, tuple):
        return params
    count = jax.tree.leaves(params.layers)[0].shape[0]
    layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], params.layers) for i in range(count))
    return params.replace(layers=layers)


def prefill(
    params: LlamaParams,
    config: LlamaConfig,
    tokens: Int[Array, "batch time"],
    lengths: Int[Array, " batch"],
    rows: Int[Array, " batch"] | None,
    *,
    slots: int,
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Logits after each row's last prompt token, and a cache of `slots` >= time slots.

    `params` has unstacked layers; `tokens` is padded on the right to the common length.
    """
    time = tokens.shape[1]
    at = jnp.arange(time)
    rope = rope_tables(config, at)
    mask = visible(config, at[:, None], at)
    x = kernels.embed(tokens, params.embed, rows)
    last = (lengths - 1)[:, None, None]
    room = slots - time
    keys, values = [], []
    for index, weights in enumerate(params.layers):
        q, k, v = attention_inputs(x, weights, config, rope, rows)
        keys.append(jnp.pad(k.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, room))))
        values.append(jnp.pad(v.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, room), (0, 0))))
        mixed = attend(q, k, v, mask)
        if index == len(params.layers) - 1:
            # Only the last token's output is wanted: the top layer's MLP and the head run on it.
            x = jnp.take_along_axis(x, last, axis=1)
            mixed = jnp.take_along_axis(mixed, last, axis=1)
        x = layer_output(x, mixed, weights, config, rows)
    return logits_of(x, params, config, rows)[:, 0], KVCache(tuple(keys), tuple(values))


def decode_step(
    params: LlamaParams,
    config: LlamaConfig,
    token: Int[Array, " batch"],
    cache: KVCache,
    *,
    lengths: Int[Array, " batch"],
    prompt_slots: Int[Array, ""],
    slot: Int[Array, ""],
    rows: Int[Array, " batch"] | None = None,
) -> tuple[Float[Array, "batch vocab"], KVCache]:
    """Feed one token per row into `slot` and return the logits after it.

    `lengths` are the prompts' lengths, `prompt_slots` is where generated tokens begin.
    """
    positions = lengths + slot - prompt_slots
    rope = rope_tables(config, positions[:, None])
    index = jnp.arange(cache.slots)
    generated = (index >= prompt_slots) & (index <= slot)
    # The position of the token in each slot; slots between a prompt and `prompt_slots` hold none.
    at = jnp.where(generated, lengths[:, None] + index - prompt_slots, index)
    mask = (index < lengths[:, None]) | generated
    mask &= visible(config, positions[:, None], at)
    x = kernels.embed(token[:, None], params.embed, rows)
    keys, values = [], []
    for layer, weights in enumerate(params.layers):
        q, k, v = attention_inputs(x, weights, config, rope, rows)
        keys.append(
            lax.dynamic_update_slice(cache.keys[layer], k.transpose(0, 2, 3, 1), (0, 0, 0, slot))
        )
        values.append(
            lax.dynamic_update_slice(cache.values[layer], v.transpose(0, 2, 1, 3), (0, 0, slot, 0))
        )
        mixed = _attend_cache(q[:, 0], keys[-1], values[-1], mask)
        x = layer_output(x, mixed[:, None], weights, config, rows)
    return logits_of(x, params, config, rows)[:, 0], KVCache(tuple(keys), tuple(values))


def reshape_cache(cache: KVCache, keep: Int[Array, " kept"], slots: int) -> KVCache:
    """The cache of the rows `keep`, grown to `slots`."""
    room = slots - cache.slots

    def pick(leaf: Array, axis: int) -> Array:
        widths = [(0, room if i == axis else 0) for i in range(4)]
        return jnp.pad(leaf[keep], widths)

    return KVCache(
        keys=tuple(pick(leaf, 3) for leaf in cache.keys),
        values=tuple(pick(leaf, 2) for leaf in cache.values),
    )


def _attend_cache(
    q: Float[Array, "batch heads d"], keys: Array, values: Array, visible: Array
) -> Float[Array, "batch heads_d"]:
    batch, heads, d = q.shape
    kv_heads = keys.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, d)
    scores = jnp.einsum("bkgd,bkds->bkgs", grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * (d**-0.5), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgs,bksd->bkgd", weights, values).reshape(batch, heads * d)
