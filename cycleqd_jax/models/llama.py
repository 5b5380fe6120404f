"""The forward pass of the Llama family: pure functions over `LlamaParams`, layers by `lax.scan`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cycleqd_jax.models import kernels
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.specs import LayerParams, LeafSpec, LlamaParams, leaf_table

__all__ = ["LayerParams", "LlamaParams", "forward", "init_params"]

_UNROLL_LIMIT = 8
# Constants of a program are part of its text: 1 MB of them for 4096 positions of 32 frequencies.
_MOST_CONSTANT = 4096


def init_params(key: Array, config: LlamaConfig) -> LlamaParams:
    """Random weights of the table's scale, norms of ones, biases of zeros, in `config.dtype`."""
    specs, structure = jax.tree.flatten(leaf_table(config))
    keys = jax.random.split(key, len(specs))

    def leaf(key: Array, spec: LeafSpec) -> Array:
        shape = spec.full_shape(config.num_layers)
        if spec.init_std is None:
            return jnp.ones(shape, config.dtype)
        return (spec.init_std * jax.random.normal(key, shape)).astype(config.dtype)

    return jax.tree.unflatten(structure, [leaf(k, s) for k, s in zip(keys, specs, strict=True)])


def forward(
    params: LlamaParams,
    config: LlamaConfig,
    tokens: Int[Array, "batch time"],
    rows: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch time vocab"]:
    """Float32 logits after every token, causal; padding on the right does not change them.

    `params` may hold kernels of many candidates, then `rows` is the candidate of each batch row.
    """
    time = tokens.shape[1]
    positions = jnp.arange(time)
    rope = rope_range(config, 0, time)
    mask = visible(config, positions[:, None], positions)

    def layer(x: Array, weights: LayerParams) -> tuple[Array, None]:
        q, k, v = attention_inputs(x, weights, config, rope, rows)
        mixed = attend(q, k, v, mask)
        return layer_output(x, mixed, weights, config, rows), None

    x = kernels.embed(tokens, params.embed, rows)
    x, _ = lax.scan(layer, x, params.layers, unroll=layer_unroll(config))
    return logits_of(x, params, config, rows)


def layer_unroll(config: LlamaConfig) -> int:
    """How many layers `lax.scan` writes out: all of a shallow model, one of a deep one.

    A loop saves every layer's residuals into stacked arrays for the backward pass: writing out four
    layers of width 128 saved an eighth of the processor time. Deep models want the short
    compilation.
    """
    return config.num_layers if config.num_layers <= _UNROLL_LIMIT else 1


def rms_norm(x: Float[Array, "batch time d"], weight: Array, eps: float) -> Array:
    """Root-mean-square norm x / rms(x) · weight, the mean of squares in float32."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Rotary frequencies (head_dim / 2,) in float32, scaled as Llama 3.1 does where configured."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequency = (1.0 / np.power(np.float32(config.rope_theta), exponent)).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    # Long wavelengths are stretched by `factor`, short ones stay, those between are blended.
    turns = scaling.original_max_positions * frequency / (2 * np.pi)
    smooth = (turns - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * frequency / scaling.factor + smooth * frequency).astype(np.float32)


def rope_tables(config: LlamaConfig, positions: Int[Array, "*shape"]) -> tuple[Array, Array]:
    """Cosines and sines, each (*shape, head_dim / 2), in float32."""
    angles = positions.astype(jnp.float32)[..., None] * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rope_range(config: LlamaConfig, start: int, stop: int) -> tuple[Array, Array]:
    """The tables of all positions from `start` to before `stop`.

    Constants of the program, unless they are many: a compiler that fuses them into what they are
    multiplied with computes a sine for every number of every head, which took a fifth of a small
    prefill on a CPU.
    """
    if stop - start > _MOST_CONSTANT:
        return rope_tables(config, jnp.arange(start, stop))
    angles = np.arange(start, stop, dtype=np.float32)[:, None] * rope_frequencies(config)
    return jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))


def rotate(x: Float[Array, "*batch time heads d"], cos: Array, sin: Array) -> Array:
    """Rotary positions in Hugging Face's layout: the halves of a head form the pairs.

    `cos`, `sin` are (time, d / 2), or (*batch, time, d / 2).
    """
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[..., None, :].astype(x.dtype), sin[..., None, :].astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def visible(
    config: LlamaConfig, queries: Int[Array, "..."], keys: Int[Array, "..."]
) -> Bool[Array, "..."]:
    """Whether a query at a position may look at a key: not ahead, and inside the window if any.

    The two arrays of positions are broadcast against each other.
    """
    mask = keys <= queries
    if config.sliding_window is not None:
        mask &= queries - keys < config.sliding_window
    return mask


def attention_inputs(
    x: Float[Array, "batch time hidden"],
    weights: LayerParams,
    config: LlamaConfig,
    rope: tuple[Array, Array],
    rows: Int[Array, " batch"] | None,
) -> tuple[Array, Array, Array]:
    """Rotated queries (batch, time, heads, d), keys and values (batch, time, kv_heads, d)."""
    batch, time, _ = x.shape
    normed = rms_norm(x, kernels.norm_weight(weights.attn_norm, rows), config.norm_eps)

    def heads(kernel: Any, bias: Any) -> Array:
        y = kernels.project(normed, kernel, rows)
        if bias is not None:
            y = y + kernels.norm_weight(bias, rows)
        return y.reshape(batch, time, -1, config.head_dim)

    q = heads(weights.q, weights.q_bias)
    k = heads(weights.k, weights.k_bias)
    v = heads(weights.v, weights.v_bias)
    return rotate(q, *rope), rotate(k, *rope), v


def attend(
    q: Float[Array, "batch time heads d"],
    k: Float[Array, "batch keys kv_heads d"],
    v: Float[Array, "batch keys kv_heads d"],
    mask: Bool[Array, "*rows time keys"],
) -> Float[Array, "batch time heads_d"]:
    """Softmax attention; query heads share key heads in groups, keys are never repeated.

    `mask` is True where a query may look: (time, keys), or (batch, 1, 1, time, keys). Queries of a
    group are stacked along time, so that a group's scores are one matrix product per (row, key
    head).
    """
    batch, time, heads, d = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    queries = q.reshape(batch, time, kv_heads, group, d).transpose(0, 2, 3, 1, 4)
    queries = queries.reshape(batch, kv_heads, group * time, d)
    keys_first, values_first = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum(
        "bkqd,bksd->bkqs", queries, keys_first, preferred_element_type=jnp.float32
    ).reshape(batch, kv_heads, group, time, keys)
    scores = jnp.where(mask, scores * (d**-0.5), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum(
        "bkqs,bksd->bkqd", weights.reshape(batch, kv_heads, group * time, keys), values_first
    ).reshape(batch, kv_heads, group, time, d)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads * d)


def layer_output(
    x: Float[Array, "batch time hidden"],
    mixed: Float[Array, "batch time heads_d"],
    weights: LayerParams,
    config: LlamaConfig,
    rows: Int[Array, " batch"] | None,
) -> Float[Array, "batch time hidden"]:
    """The layer after its attention: output projection, residual, gated MLP, residual."""
    x = x + kernels.project(mixed, weights.o, rows)
    normed = rms_norm(x, kernels.norm_weight(weights.mlp_norm, rows), config.norm_eps)
    gate = kernels.project(normed, weights.gate, rows)
    inner = jax.nn.silu(gate) * kernels.project(normed, weights.up, rows)
    return x + kernels.project(inner, weights.down, rows)


def logits_of(
    x: Float[Array, "batch time hidden"],
    params: LlamaParams,
    config: LlamaConfig,
    rows: Int[Array, " batch"] | None,
) -> Float[Array, "batch time vocab"]:
    """Final norm and head, in float32."""
    x = rms_norm(x, kernels.norm_weight(params.final_norm, rows), config.norm_eps)
    return kernels.unembed(x, params.embed, params.head, rows).astype(jnp.float32)
