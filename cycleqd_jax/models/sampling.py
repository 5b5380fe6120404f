"""How the next token is chosen: greedily, or drawn at a temperature from the likeliest tokens.

The cuts of top-k and top-p are thresholds on the logits. A threshold is found by bisection over the
32 bits of a float, so that no row sorts its vocabulary: 32 sums over the row instead, the same on
every backend, and ties are kept or dropped together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_ARGMAX_BLOCK = 32
# Quotients of logits by less overflow float32 sooner or later; by this much none is drawn but the
# likeliest either way.
_COLDEST = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it, at least 1e-6; 0 is greedy decoding.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: then only the likeliest that hold at least this share of the probability.

    Raises:
        ValueError: a negative or tiny temperature, a negative top_k, or a top_p outside (0, 1].
    """

    temperature: float | int = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature: expected at least 0, found {self.temperature}")
        if 0.0 < self.temperature < _COLDEST:
            raise ValueError(
                f"temperature: expected 0 or at least {_COLDEST:g}, found {self.temperature:g}: "
                "use 0, which is greedy decoding"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 0 (0 for no limit), found {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected a share in (0, 1], found {self.top_p}")

    def cuts(self) -> "Cuts | None":
        """The numbers as arguments of a compiled program; None for greedy decoding."""
        if self.temperature == 0.0:
            return None
        return Cuts(
            temperature=jnp.float32(self.temperature),
            top_k=jnp.int32(self.top_k or jnp.iinfo(jnp.int32).max),
            top_p=jnp.float32(self.top_p),
        )


class Cuts(flax.struct.PyTreeNode):
    """`Sampling` as scalars on the device, so that other settings compile nothing."""

    temperature: Array
    top_k: Array
    top_p: Array


def choose(
    logits: Float[Array, "batch vocab"],
    cuts: Cuts | None,
    seeds: Int[Array, " batch"],
    counts: Int[Array, " batch"],
) -> Int[Array, " batch"]:
    """The next token of every row.

    `seeds` are the rows' own, `counts` how many tokens each has generated: the noise of a token
    follows from these two alone, whatever else is in the batch.
    """
    if cuts is None:
        return greedy(logits)
    scaled = logits / cuts.temperature
    scaled = jnp.where(kept(scaled, cuts.top_k, cuts.top_p), scaled, -jnp.inf)

    def noise(seed: Array, count: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), count)
        return jax.random.gumbel(key, logits.shape[1:])

    return greedy(scaled + jax.vmap(noise)(seeds, counts))


def greedy(logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """The likeliest token of every row, the first of equals.

    Searched in two levels: XLA's CPU backend vectorises a maximum, but not an argmax.
    """
    batch, vocab = logits.shape
    if vocab <= _ARGMAX_BLOCK:
        return _first_maximum(logits)
    padding = -vocab % _ARGMAX_BLOCK
    padded = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    blocks = padded.reshape(batch, -1, _ARGMAX_BLOCK)
    block = _first_maximum(blocks.max(axis=-1))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _ARGMAX_BLOCK + _first_maximum(inside)


def kept(
    logits: Float[Array, "batch vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Bool[Array, "batch vocab"]:
    """Which tokens may be drawn: the `top_k` likeliest, of those the fewest that hold `top_p`.

    Tokens as likely as the last one that is kept are kept too.
    """
    order = _ordered(logits)
    limit = jnp.minimum(top_k, logits.shape[-1])

    def count(mask: Array) -> Array:
        return mask.sum(axis=-1, dtype=jnp.int32) >= limit

    first = order >= _threshold(order, count)[:, None]
    probabilities = jax.nn.softmax(jnp.where(first, logits, -jnp.inf), axis=-1)

    def mass(mask: Array) -> Array:
        return jnp.where(mask, probabilities, 0.0).sum(axis=-1) >= top_p

    return first & (order >= _threshold(order, mass)[:, None])


def _threshold(order: Array, enough: Callable[[Array], Array]) -> Array:
    """The largest number, per row, such that the entries not below it are `enough`; 0 if none."""

    def step(i: Array, found: Array) -> Array:
        higher = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(order >= higher[:, None]), higher, found)

    return lax.fori_loop(0, 32, step, jnp.zeros(order.shape[0], jnp.uint32))


def _ordered(values: Array) -> Array:
    """Floats as unsigned integers in the same order."""
    bits = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where((bits & sign) != 0, ~bits, bits | sign)


def _first_maximum(values: Array) -> Array:
    index = jnp.arange(values.shape[-1], dtype=jnp.int32)
    best = values.max(axis=-1, keepdims=True)
    return jnp.min(jnp.where(values == best, index, index[-1]), axis=-1)
