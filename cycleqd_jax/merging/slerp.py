"""SLERP crossover: the child lies on the arc between its parents, not on the chord.

Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985). With the angle Omega
between the parents,

    child = (sin((1 - t) Omega) a + sin(t Omega) b) / sin(Omega),

one t for the whole model and one angle for every layer of every leaf. Where the parents are
nearly parallel or opposite, or one of them is zero, the angle says nothing and the child is
``(1 - t) a + t b``. Merging of language models applies the formula to the parents as they are,
without normalising their lengths, and so does this.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from cycleqd_jax.merging.crossover import Crossover
from cycleqd_jax.merging.space import (
    LAYER_AXES,
    LeafRoles,
    Space,
    basis_arrays,
    check_space,
    leaf_roles,
)
from cycleqd_jax.merging.spectral import MatrixFactors, SpectralBasis, is_factors
from cycleqd_jax.merging.static import Static
from cycleqd_jax.merging.task_vector import Role

LARGEST_COSINE = 0.9995
"""Above it in size the angle is too small, or too close to pi, to divide by its sine."""


def slerp_crossover(
    model: Any, low: Any = 0.0, high: Any = 1.0, space: Space = "spectral"
) -> Crossover:
    """Spherical interpolation of two parents, ``t ~ U[low, high]`` for the whole model.

    In the dense space a matrix leaf has one angle for every stacked layer, over its last two axes,
    and a vector leaf over its last one. In the spectral space a layer's angle is that of the
    parents' task vectors when directions of different experts are orthogonal: an inner product of
    gains weighs every direction with its squared size ``|u_i|^2 |v_i|^2`` (``|delta_e|^2`` for
    vectors). With such experts a spectral child expands to the dense one; with others it is an
    analogue. t = 0 gives the first parent.

    Args:
        model: dense: the tree of roles, or the basis or its ``GainLayout``, of which only roles
            are used. Spectral: the basis; the sizes of its directions are computed once and carried
            as arrays, one number a gain.
        low: lower end of the distribution of t; both ends may be traced.
        high: upper end.
        space: what a genotype is.

    Returns:
        A crossover that keeps the dtype of the first parent's leaves and computes in float32.

    Raises:
        ValueError: ``low > high``, the space is unknown, or "spectral" is given no arrays.
    """
    check_space(space)
    if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
        raise ValueError(f"expected low <= high for the place on the arc, found {low} > {high}")
    if space == "dense":
        return Partial(Static(_dense, leaf_roles(model)), low, high)
    sizes = _squared_sizes(basis_arrays(model, "slerp in space 'spectral'"))
    return Partial(_spectral, sizes, low, high)


def _squared_sizes(basis: SpectralBasis) -> Any:
    def squared(x: Any, axis: int) -> jax.Array:
        return jnp.sum(jnp.square(jnp.asarray(x, jnp.float32)), axis=axis)

    def sizes(factors: Any) -> jax.Array:
        if isinstance(factors, MatrixFactors):
            return squared(factors.u, -2) * squared(factors.v, -2)
        return squared(factors.delta, -1)

    return jax.tree.map(sizes, basis, is_leaf=is_factors)


def draw_place(low: Any, high: Any, key: jax.Array) -> jax.Array:
    """The place t on the arc, a scalar, that `slerp_crossover` draws from a key."""
    return low + (high - low) * jax.random.uniform(key, (), jnp.float32)


def _dense(roles: LeafRoles, low: Any, high: Any, key: jax.Array, a: Any, b: Any) -> Any:
    t = draw_place(low, high, key)

    def merge(role: Role, x: Any, y: Any) -> jax.Array:
        return _arc(t, x, y, jnp.ones((), jnp.float32), LAYER_AXES[role])

    return roles.map(merge, a, b)


def _spectral(sizes: Any, low: Any, high: Any, key: jax.Array, a: Any, b: Any) -> Any:
    t = draw_place(low, high, key)
    return jax.tree.map(lambda x, y, size: _arc(t, x, y, size, (-1,)), a, b, sizes)


def _arc(t: jax.Array, x: Any, y: Any, weight: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    a, b = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def inner(p: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.sum(weight * p * q, axis=axes, keepdims=True)

    lengths = jnp.sqrt(inner(a, a)) * jnp.sqrt(inner(b, b))
    cosine = inner(a, b) / jnp.where(lengths > 0, lengths, 1.0)
    curved = (lengths > 0) & (jnp.abs(cosine) <= LARGEST_COSINE)
    angle = jnp.arccos(jnp.where(curved, cosine, 0.0))
    share_a = jnp.where(curved, jnp.sin((1.0 - t) * angle) / jnp.sin(angle), 1.0 - t)
    share_b = jnp.where(curved, jnp.sin(t * angle) / jnp.sin(angle), t)
    return (share_a * a + share_b * b).astype(x.dtype)
