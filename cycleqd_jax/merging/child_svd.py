"""Child-SVD mutation: a child's own singular values are scaled.

The mutation of the CycleQD paper (Kuroki et al., ICLR 2025, arXiv 2410.14735, section 3.3).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from cycleqd_jax.merging.decomposition import HIGHEST
from cycleqd_jax.merging.layout import GainLayout, LeafLayout
from cycleqd_jax.merging.mutation import Mutation, split_as
from cycleqd_jax.merging.space import LeafRoles, Space, check_space, leaf_roles, spectral_layout
from cycleqd_jax.merging.static import Static, check_not_negative
from cycleqd_jax.merging.task_vector import Role


def child_svd_mutation(model: Any, w_max: Any = 2.0, space: Space = "spectral") -> Mutation:
    """Child-SVD mutation ``tau_l <- U (S w) V^T`` with ``tau_l = U S V^T``, ``w ~ U[0, w_max]``.

    Exact in the dense space: a float32 SVD of every matrix of every stacked layer, so the cost of a
    child grows with the cube of the width. The spectral space is not closed under it; there the
    gains are scaled, ``g <- g w``: the experts' directions take the place of the child's own. Both
    are the same distribution for a child of one expert, and for experts whose directions are
    orthogonal to each other. Vector leaves pass unchanged, and the expert is not looked at.

    The paper leaves ``w_max`` open. With the default of 2 the mean of w is 1, so the mutation
    neither shrinks nor grows a child on average.

    Args:
        model: dense: the tree of roles, or the basis or its ``GainLayout``, of which only roles
            are used. Spectral: the basis or its ``GainLayout``.
        w_max: upper end of the uniform distribution, not negative; may be traced.
        space: what a genotype is.

    Raises:
        ValueError: ``w_max`` is negative, the space is unknown, or "spectral" is given roles.
    """
    check_not_negative("w_max", w_max)
    check_space(space)
    if space == "spectral":
        return Partial(Static(_spectral, spectral_layout(model)), w_max)
    return Partial(Static(_dense, leaf_roles(model)), w_max)


def _spectral(layout: GainLayout, w_max: Any, key: jax.Array, genotype: Any, expert: Any) -> Any:
    del expert
    keys = split_as(key, len(layout.leaves))
    leaves = layout.treedef.flatten_up_to(genotype)

    def scale(i: int, leaf: LeafLayout) -> jax.Array:
        g = leaves[i]
        if leaf.role == "vector":
            return g
        w = w_max * jax.random.uniform(keys[i], g.shape, jnp.float32)
        return (g.astype(jnp.float32) * w).astype(g.dtype)

    return layout.build(scale)


def _dense(roles: LeafRoles, w_max: Any, key: jax.Array, genotype: Any, expert: Any) -> Any:
    del expert
    keys = roles.treedef.unflatten(split_as(key, len(roles.roles)))

    def scale(role: Role, x: Any, leaf_key: jax.Array) -> Any:
        if role == "vector":
            return x
        u, s, vt = jnp.linalg.svd(jnp.asarray(x, jnp.float32), full_matrices=False)
        w = w_max * jax.random.uniform(leaf_key, s.shape, jnp.float32)
        return jnp.matmul(u * (s * w)[..., None, :], vt, precision=HIGHEST).astype(x.dtype)

    return roles.map(scale, genotype, keys)
