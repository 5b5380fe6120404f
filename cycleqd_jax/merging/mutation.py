"""Mutation: a child is perturbed along singular directions, or by noise.

A mutation that needs arrays (a basis in the dense space) carries them as a
``jax.tree_util.Partial``: the mutation is itself a pytree, and a function that takes it as an
argument compiles without them as constants.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from cycleqd_jax.merging.layout import GainLayout, LeafLayout
from cycleqd_jax.merging.spectral import SpectralBasis, expand, gain_layout

Mutation = Callable[[jax.Array, Any, Any], Any]
"""``(key, genotype, expert) -> genotype``: no batch axis; ``expert`` is an int32 scalar."""

Space = Literal["spectral", "dense"]


def _split_as(key: jax.Array, count: int) -> list[jax.Array]:
    return list(jax.random.split(key, count)) if count else []


def _check_strength(name: str, value: float) -> None:
    if value < 0:
        raise ValueError(f"{name} must not be negative, found {value}")


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


def _add(genotype: Any, increment: Any) -> Any:
    return jax.tree.map(
        lambda g, w: (g.astype(jnp.float32) + w).astype(g.dtype), genotype, increment
    )


def _spectral_expert_svd(
    layout: GainLayout, w_max: float, key: jax.Array, genotype: Any, expert: Any
) -> Any:
    return _add(genotype, draw_expert_gains(key, layout, expert, w_max))


def _dense_expert_svd(
    basis: SpectralBasis, w_max: Any, key: jax.Array, genotype: Any, expert: Any
) -> Any:
    return _add(genotype, expand(basis, draw_expert_gains(key, basis, expert, w_max)))


def expert_svd_mutation(
    basis: SpectralBasis | GainLayout, w_max: float = 0.1, space: Space = "spectral"
) -> Mutation:
    """Expert-SVD mutation ``tau_l <- tau_l + U_q (S_q w) V_q^T``, ``w ~ U[0, w_max]``.

    The directions are expert q's. Both spaces draw the same w for the same key, so a spectral
    child expands to the dense one. Vector leaves pass unchanged. This is what the authors' code
    of CycleQD computes (arXiv 2410.14735).

    Args:
        basis: the experts' basis; in the spectral space its ``GainLayout`` is enough, and all
            that is kept.
        w_max: upper end of the uniform distribution, not negative.
        space: what a genotype is: "spectral" (gains) or "dense" (task vectors). The dense
            mutation is a pytree that carries the basis; hand it to jitted functions as an
            argument.

    Raises:
        ValueError: ``w_max`` is negative, the space is unknown, or "dense" is given a bare layout.
    """
    _check_strength("w_max", w_max)
    if space == "spectral":
        return Partial(_Static(_spectral_expert_svd, gain_layout(basis), w_max))
    if space == "dense":
        if isinstance(basis, GainLayout):
            raise ValueError("space 'dense' needs the basis with its arrays, found a GainLayout")
        return Partial(_dense_expert_svd, basis, w_max)
    raise ValueError(f"space must be 'spectral' or 'dense', found {space!r}")


def gain_scaling_mutation(basis: SpectralBasis | GainLayout, w_max: float = 2.0) -> Mutation:
    """Scaling of matrix gains, ``g <- g w`` with ``w ~ U[0, w_max]``, whoever the expert is.

    The spectral space's analogue of the paper's child-SVD mutation ``U (S w) V^T``, which scales
    the child's own singular values and is not closed in this space: here the experts' directions
    are scaled instead. Both agree for a child whose blocks are orthogonal to each other. Vector
    gains pass unchanged.

    Raises:
        ValueError: ``w_max`` is negative.
    """
    _check_strength("w_max", w_max)
    return Partial(_Static(_scale_gains, gain_layout(basis), w_max))


def _scale_gains(
    layout: GainLayout, w_max: float, key: jax.Array, genotype: Any, expert: Any
) -> Any:
    del expert
    keys = _split_as(key, len(layout.leaves))
    leaves = layout.treedef.flatten_up_to(genotype)

    def scale(i: int, leaf: LeafLayout) -> jax.Array:
        g = leaves[i]
        if leaf.role == "vector":
            return g
        w = w_max * jax.random.uniform(keys[i], g.shape, jnp.float32)
        return (g.astype(jnp.float32) * w).astype(g.dtype)

    return layout.build(scale)


def gaussian_mutation(sigma: float) -> Mutation:
    """Gaussian mutation: adds ``N(0, sigma^2)`` to every entry of any tree, in float32, dtype kept.

    Raises:
        ValueError: ``sigma`` is negative.
    """
    _check_strength("sigma", sigma)
    return Partial(_gaussian, sigma)


def _gaussian(sigma: Any, key: jax.Array, genotype: Any, expert: Any) -> Any:
    del expert
    treedef: Any = jax.tree.structure(genotype)
    keys = treedef.unflatten(_split_as(key, treedef.num_leaves))

    def perturb(x: jax.Array, k: jax.Array) -> jax.Array:
        noise = sigma * jax.random.normal(k, x.shape, jnp.float32)
        return (x.astype(jnp.float32) + noise).astype(x.dtype)

    return jax.tree.map(perturb, genotype, keys)


def no_mutation() -> Mutation:
    """The mutation that returns the genotype unchanged."""
    return Partial(_unchanged)


def _unchanged(key: jax.Array, genotype: Any, expert: Any) -> Any:
    del key, expert
    return genotype


class _Static:
    """A function with hashable leading arguments, equal to another one with equal arguments.

    ``functools.partial`` compares by identity, so an operator that is built twice would compile
    twice.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._parts = (function, args)

    def __call__(self, *args: Any) -> Any:
        function, leading = self._parts
        return function(*leading, *args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)
