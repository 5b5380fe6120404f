"""Crossover: two parents' task vectors (or gains) become one child's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from cycleqd_jax.merging.static import check_not_negative

Crossover = Callable[[jax.Array, Any, Any], Any]
"""``(key, first parent, second parent) -> child``: three trees of one structure, no batch axis."""

SMALLEST_WEIGHT_SUM = 1e-6


def linear_crossover(mean: Any = 1.0, std: Any = 0.1) -> Crossover:
    """Normalised linear merge ``(w1 a + w2 b) / (w1 + w2)``, ``w_i ~ N(mean, std^2)``.

    One pair of weights for the whole model; negative weights are allowed. When
    ``|w1 + w2| < 1e-6`` the child is the parents' mean. The same formula serves task vectors and
    gains (CycleQD, Kuroki et al., arXiv 2410.14735).

    Args:
        mean: mean of a parent's weight; both numbers may be traced.
        std: its standard deviation, not negative.

    Returns:
        A crossover that keeps the dtype of the first parent's leaves and computes in float32.

    Raises:
        ValueError: ``std`` is negative.
    """
    check_not_negative("std of the merge weights", std)
    return Partial(_linear, mean, std)


def draw_weights(mean: Any, std: Any, key: jax.Array) -> Float[Array, " parents"]:
    """The weights (w1, w2) that `linear_crossover` draws from a key."""
    return mean + std * jax.random.normal(key, (2,), jnp.float32)


def _linear(mean: Any, std: Any, key: jax.Array, a: Any, b: Any) -> Any:
    weights = draw_weights(mean, std, key)
    total = weights[0] + weights[1]
    defined = jnp.abs(total) >= SMALLEST_WEIGHT_SUM
    # Each share ends in a division of two scalars: anything cheaper is computed again by XLA for
    # every element of the child, with the drawing of the weights before it.
    total = jnp.where(defined, total, 1.0)
    first = jnp.where(defined, weights[0], 0.5) / total
    second = jnp.where(defined, weights[1], 0.5) / total

    def merge(x: jax.Array, y: jax.Array) -> jax.Array:
        child = first * x.astype(jnp.float32) + second * y.astype(jnp.float32)
        return child.astype(x.dtype)

    return jax.tree.map(merge, a, b)
