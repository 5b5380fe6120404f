"""Mutation: a child is perturbed, by noise or along singular directions.

Here are the protocol and the mutations that need to know nothing of the model; those along
singular directions are `expert_svd`, `child_svd` and `singular_values`. A mutation that needs
arrays (a basis in the dense space) carries them as a ``jax.tree_util.Partial``: the mutation is
itself a pytree, and a function that takes it as an argument compiles without them as constants.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from cycleqd_jax.merging.static import check_not_negative

Mutation = Callable[[jax.Array, Any, Any], Any]
"""``(key, genotype, expert) -> genotype``: no batch axis; ``expert`` is an int32 scalar."""


def split_as(key: jax.Array, count: int) -> list[jax.Array]:
    """One key for each of ``count`` leaves."""
    return list(jax.random.split(key, count)) if count else []


def add_increment(genotype: Any, increment: Any) -> Any:
    """Genotype plus a float32 tree, added in float32, the genotype's dtypes kept."""
    return jax.tree.map(
        lambda g, w: (g.astype(jnp.float32) + w).astype(g.dtype), genotype, increment
    )


def gaussian_mutation(sigma: Any) -> Mutation:
    """Gaussian mutation: adds ``N(0, sigma^2)`` to every entry of any tree, in float32, dtype kept.

    ``sigma`` is a scalar and may be traced.

    Raises:
        ValueError: ``sigma`` is negative.
    """
    check_not_negative("sigma", sigma)
    return Partial(_gaussian, sigma)


def _gaussian(sigma: Any, key: jax.Array, genotype: Any, expert: Any) -> Any:
    del expert
    treedef: Any = jax.tree.structure(genotype)
    keys = treedef.unflatten(split_as(key, treedef.num_leaves))
    noise = jax.tree.map(
        lambda x, k: sigma * jax.random.normal(k, x.shape, jnp.float32), genotype, keys
    )
    return add_increment(genotype, noise)


def no_mutation() -> Mutation:
    """The mutation that returns the genotype unchanged."""
    return Partial(_unchanged)


def _unchanged(key: jax.Array, genotype: Any, expert: Any) -> Any:
    del key, expert
    return genotype
