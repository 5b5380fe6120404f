"""Expert-SVD mutation: a child moves along the singular directions of one expert.

What the authors' code of CycleQD computes (Kuroki et al., ICLR 2025, arXiv 2410.14735).
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from cycleqd_jax.merging.layout import GainLayout, LeafLayout
from cycleqd_jax.merging.mutation import Mutation, add_increment
from cycleqd_jax.merging.space import Space, basis_arrays, check_space, spectral_layout
from cycleqd_jax.merging.spectral import SpectralBasis, expand, gain_layout
from cycleqd_jax.merging.static import Static, check_not_negative


def draw_expert_gains(
    key: jax.Array, basis: SpectralBasis | GainLayout, expert: Any, w_max: Any
) -> Any:
    """Random increment of one expert's matrix gains: ``w ~ U[0, w_max]``, 0 elsewhere.

    Only as many numbers are drawn as the largest block holds; vector leaves stay zero.

    Args:
        key: random key.
        basis: a basis or its ``GainLayout``; only static shapes are used.
        expert: int32 scalar, may be traced.
        w_max: scalar, upper end of the uniform distribution.

    Returns:
        Tree of gains: matrix leaves (..., R), vector leaves (..., E), float32.
    """
    layout = gain_layout(basis)
    expert = jnp.asarray(expert, jnp.int32)
    shapes = [
        (*leaf.batch_shape, max(leaf.ranks, default=0) if leaf.role == "matrix" else 0)
        for leaf in layout.leaves
    ]
    ends = tuple(itertools.accumulate(map(math.prod, shapes), initial=0))
    # One draw for the whole model: many small ones cost more than the numbers in them.
    w = jnp.asarray(w_max, jnp.float32) * jax.random.uniform(key, (ends[-1],), jnp.float32)

    def place(i: int, leaf: LeafLayout) -> jax.Array:
        if not math.prod(shapes[i]):
            return jnp.zeros(leaf.shape, jnp.float32)
        block = w[ends[i] : ends[i + 1]].reshape(shapes[i])
        blocks = jnp.concatenate([block[..., :rank] for rank in leaf.ranks], axis=-1)
        return jnp.where(leaf.owner == expert, blocks, 0.0)

    return layout.build(place)


def expert_svd_mutation(
    basis: SpectralBasis | GainLayout, w_max: Any = 0.1, space: Space = "spectral"
) -> Mutation:
    """Expert-SVD mutation ``tau_l <- tau_l + U_q (S_q w) V_q^T``, ``w ~ U[0, w_max]``.

    The directions are expert q's. Both spaces draw the same w for the same key, so a spectral
    child expands to the dense one. Vector leaves pass unchanged; matrices all change, embeddings
    and head included.

    Args:
        basis: the experts' basis; in the spectral space its ``GainLayout`` is enough, and all
            that is kept.
        w_max: upper end of the uniform distribution, not negative; may be traced.
        space: what a genotype is. The dense mutation is a pytree that carries the basis; hand it
            to jitted functions as an argument.

    Raises:
        ValueError: ``w_max`` is negative, the space is unknown, or "dense" is given a bare layout.
    """
    check_not_negative("w_max", w_max)
    check_space(space)
    if space == "spectral":
        return Partial(Static(_spectral, spectral_layout(basis)), w_max)
    return Partial(_dense, basis_arrays(basis, "expert-SVD mutation in space 'dense'"), w_max)


def _spectral(layout: GainLayout, w_max: Any, key: jax.Array, genotype: Any, expert: Any) -> Any:
    return add_increment(genotype, draw_expert_gains(key, layout, expert, w_max))


def _dense(basis: SpectralBasis, w_max: Any, key: jax.Array, genotype: Any, expert: Any) -> Any:
    return add_increment(genotype, expand(basis, draw_expert_gains(key, basis, expert, w_max)))
