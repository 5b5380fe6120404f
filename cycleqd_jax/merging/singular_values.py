"""Singular-value mutation: Gaussian noise on the leading singular values of the weights.

The mutation of AC/DC (Dai et al., "Discovering Novel LLM Experts via Task-Capability Coevolution",
ICLR 2026, arXiv 2604.14969): what a matrix responds to stays, how strongly it responds changes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from cycleqd_jax.merging.decomposition import HIGHEST
from cycleqd_jax.merging.layout import GainLayout, LeafLayout
from cycleqd_jax.merging.mutation import Mutation, add_increment, split_as
from cycleqd_jax.merging.space import LeafRoles, Space, check_space, leaf_roles, spectral_layout
from cycleqd_jax.merging.static import Static, check_not_negative
from cycleqd_jax.merging.task_vector import Role, check_same_structure


def singular_value_mutation(
    model: Any, sigma: Any, k: int, space: Space = "spectral", base: Any | None = None
) -> Mutation:
    """Gaussian noise on the k largest singular values of every weight matrix.

    Dense, as in AC/DC: the child's weights ``W = W_0 + tau = U S V^T`` become
    ``U max(S + n, 0) V^T`` with ``n_i ~ N(0, sigma^2)`` for i < k and 0 for the others, written
    as a change of tau. One float32 SVD a matrix and child; ``sigma`` is in units of the weights'
    singular values. The authors' code uses sigma = 0.25 and k = 256.

    Spectral: the weights' own singular directions are outside the space. The analogue adds
    ``N(0, sigma^2)`` to the gains of the k leading directions of each expert; ``sigma`` is there in
    units of each direction's own singular value, and gains may become negative.

    Vector leaves pass unchanged, and the expert is not looked at.

    Args:
        model: dense: the tree of roles, or the basis or its ``GainLayout``, of which only roles
            are used. Spectral: the basis or its ``GainLayout``.
        sigma: standard deviation of the noise, not negative; may be traced.
        k: number of singular values that are perturbed, at least 1; of a smaller matrix all are.
        space: what a genotype is.
        base: dense only: the weights that task vectors are added to, carried as arrays.

    Raises:
        ValueError: ``sigma`` is negative, ``k < 1``, the space is unknown, the base is missing,
            not needed or another model's, or "spectral" is given roles.
    """
    check_not_negative("sigma", sigma)
    check_space(space)
    if k < 1:
        raise ValueError(f"expected at least 1 singular value to perturb, found k = {k}")
    if space == "spectral":
        if base is not None:
            raise ValueError("space 'spectral' has no use for a base, found one: leave it out")
        return Partial(Static(_spectral, spectral_layout(model), k), sigma)
    if base is None:
        raise ValueError("space 'dense' needs the base: the singular values are those of the sum")
    roles = leaf_roles(model)
    check_same_structure(roles.treedef.unflatten(roles.roles), base, "the roles", "the base")
    return Partial(Static(_dense, roles, k), base, sigma)


def _spectral(
    layout: GainLayout, k: int, sigma: Any, key: jax.Array, genotype: Any, expert: Any
) -> Any:
    del expert
    keys = split_as(key, len(layout.leaves))

    def draw(i: int, leaf: LeafLayout) -> jax.Array:
        leading = min(k, max(leaf.ranks))
        if leaf.role == "vector" or leading == 0:
            return jnp.zeros(leaf.shape, jnp.float32)
        shape = (*leaf.batch_shape, len(leaf.ranks), leading)
        noise = sigma * jax.random.normal(keys[i], shape, jnp.float32)
        place = np.minimum(leaf.position, leading - 1)
        return jnp.where(leaf.position < leading, noise[..., leaf.owner, place], 0.0)

    return add_increment(genotype, layout.build(draw))


def _dense(
    roles: LeafRoles, k: int, base: Any, sigma: Any, key: jax.Array, genotype: Any, expert: Any
) -> Any:
    del expert
    keys = roles.treedef.unflatten(split_as(key, len(roles.roles)))

    def change(role: Role, x: Any, w0: Any, leaf_key: jax.Array) -> Any:
        if role == "vector":
            return x
        tau = jnp.asarray(x, jnp.float32)
        u, s, vt = jnp.linalg.svd(jnp.asarray(w0, jnp.float32) + tau, full_matrices=False)
        u, s, vt = u[..., :k], s[..., :k], vt[..., :k, :]
        noise = sigma * jax.random.normal(leaf_key, s.shape, jnp.float32)
        step = jnp.maximum(s + noise, 0.0) - s
        # Adding the change keeps the part of tau outside the k directions to the last bit.
        return (tau + jnp.matmul(u * step[..., None, :], vt, precision=HIGHEST)).astype(x.dtype)

    return roles.map(change, genotype, base, keys)
