"""Experts given as low-rank updates (LoRA): their singular directions without the full matrices.

A LoRA expert's task vector is ``tau = left right^T`` with r columns. The thin QR factors of the two
reduce its SVD to one of an r by r matrix (Golub and Van Loan, Matrix Computations, 5.4):

    left = Q_l R_l,   right = Q_r R_r,   R_l R_r^T = P S W^T,   u = Q_l P S,   v = Q_r W

so the basis holds the expert exactly, at its own rank, and its gains are those of singular
directions, as `decompose` gives them for full weights.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cycleqd_jax.merging.decomposition import DecompositionReport
from cycleqd_jax.merging.spectral import (
    MatrixFactors,
    SpectralBasis,
    VectorFactors,
    gain_layout,
)
from cycleqd_jax.merging.task_vector import check_same_structure, leaf_paths


class LowRank(struct.PyTreeNode):
    """A matrix leaf's task vector ``left right^T``, never built.

    Attributes:
        left: (..., m, r), any float dtype; r may be 0 for a matrix that was not touched.
        right: (..., n, r).
    """

    left: Any
    right: Any


def is_low_rank(node: Any) -> bool:
    """Whether a node of a task vector is a `LowRank` (an ``is_leaf``)."""
    return isinstance(node, LowRank)


def factorise_low_rank(
    update: LowRank, rank: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank-one terms ``left right^T = sum_i u_i v_i^T`` over singular directions, largest first.

    Computed in float64 on the host: the factors are thin.

    Args:
        update: factors (..., m, r) and (..., n, r).
        rank: upper limit for the number of directions, or None.

    Returns:
        u (..., m, k) and v (..., n, k), float32, with v orthonormal and k at most r: directions
        that no layer has (padding, factors that are still zero) are left out. And the relative
        error (...) of what ``rank`` dropped.
    """
    left, right = (np.asarray(side, np.float64) for side in (update.left, update.right))
    if left.shape[-1] == 0:
        return left.astype(np.float32), right.astype(np.float32), np.zeros(left.shape[:-2], "f4")
    (left_q, left_r), (right_q, right_r) = np.linalg.qr(left), np.linalg.qr(right)
    p, values, wt = np.linalg.svd(left_r @ np.swapaxes(right_r, -1, -2))
    norm = np.sqrt(np.sum(values**2, axis=-1))
    noise = np.finfo(np.float64).eps * 64 * norm[..., None]
    there = np.flatnonzero((values > noise).reshape(-1, values.shape[-1]).any(axis=0))
    kept = int(there[-1]) + 1 if there.size else 0
    kept = kept if rank is None else min(kept, rank)
    dropped = np.sqrt(np.sum(values[..., kept:] ** 2, axis=-1))
    error = np.where(norm > 0, dropped / np.where(norm > 0, norm, 1.0), 0.0)
    if rank is None or kept < rank:
        error = np.zeros_like(error)  # what was left out is the arithmetic's own noise
    u = left_q @ (p[..., :kept] * values[..., None, :kept])
    v = right_q @ np.swapaxes(wt, -1, -2)[..., :kept]
    return u.astype(np.float32), v.astype(np.float32), error.astype(np.float32)


def decompose_low_rank(
    update: Any, roles: Any, rank: int | None = None
) -> tuple[SpectralBasis, DecompositionReport]:
    """The spectral basis of one expert given by low-rank updates; see `decompose`.

    Args:
        update: tree like the parameters, with a `LowRank` for every matrix and an array (..., d)
            for every vector.
        roles: tree of the parameters' structure of "matrix" | "vector".
        rank: keep at most this many directions of each matrix; None keeps all.

    Raises:
        ValueError: trees that differ, a matrix without `LowRank`, an entry that is not finite, or
            ``rank < 1``; the message names the leaf.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be None (exact) or at least 1, found {rank}")
    leaves = jax.tree.leaves(update, is_leaf=is_low_rank)
    treedef: Any = jax.tree.structure(update, is_leaf=is_low_rank)
    check_same_structure(treedef.unflatten([0] * len(leaves)), roles, "the update", "the roles")
    nodes: list[Any] = []
    ranks: dict[str, tuple[int, ...]] = {}
    errors: dict[str, np.ndarray] = {}
    for path, role, leaf in zip(leaf_paths(roles), jax.tree.leaves(roles), leaves, strict=True):
        if (role == "matrix") != is_low_rank(leaf):
            wanted = "LowRank factors" if role == "matrix" else "an array"
            raise ValueError(
                f"leaf '{path}': expected {wanted} for a {role}, found {type(leaf).__name__}"
            )
        if not all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(leaf)):
            raise ValueError(f"leaf '{path}' of the update has entries that are not finite")
        if role == "vector":
            nodes.append(VectorFactors(delta=jnp.asarray(leaf, jnp.float32)[..., None, :]))
            continue
        u, v, error = factorise_low_rank(leaf, rank)
        ranks[path] = (u.shape[-1],)
        errors[path] = error[..., None]
        nodes.append(MatrixFactors(u=jnp.asarray(u), v=jnp.asarray(v), ranks=ranks[path]))
    return treedef.unflatten(nodes), DecompositionReport(ranks=ranks, error=errors)


def join_experts(
    parts: Sequence[tuple[SpectralBasis, DecompositionReport]], order: Sequence[int]
) -> tuple[SpectralBasis, DecompositionReport]:
    """One basis of the experts of many, and its report.

    Args:
        parts: bases of the same model, with their reports.
        order: expert number e of the result is expert ``order[e]`` of all parts' experts, counted
            one part after another.

    Raises:
        ValueError: parts of different models, or an ``order`` that does not name every expert once.
    """
    layouts = [gain_layout(basis) for basis, _ in parts]
    total = sum(layout.num_experts for layout in layouts)
    if sorted(order) != list(range(total)):
        raise ValueError(f"order: expected every expert of 0..{total - 1} once, found {[*order]}")
    if any(layout.treedef != layouts[0].treedef for layout in layouts):
        raise ValueError("expected bases of one model, found trees of different structure")
    if len(parts) == 1 and [*order] == list(range(total)):
        return parts[0]
    columns = [layouts[0].treedef.flatten_up_to(basis) for basis, _ in parts]
    nodes = [_join(row, order) for row in zip(*columns, strict=True)]
    ranks = {
        path: _picked([report.ranks[path] for _, report in parts], order)
        for path in parts[0][1].ranks
    }
    errors = {
        path: np.concatenate([report.error[path] for _, report in parts], axis=-1)[..., [*order]]
        for path in parts[0][1].error
    }
    return layouts[0].treedef.unflatten(nodes), DecompositionReport(ranks=ranks, error=errors)


def _join(row: Sequence[Any], order: Sequence[int]) -> MatrixFactors | VectorFactors:
    if isinstance(row[0], VectorFactors):
        delta = jnp.concatenate([node.delta for node in row], axis=-2)
        return VectorFactors(delta=delta[..., jnp.array(order), :])
    us = [block for node in row for block in _blocks(node.u, node.ranks)]
    vs = [block for node in row for block in _blocks(node.v, node.ranks)]
    return MatrixFactors(
        u=jnp.concatenate([us[e] for e in order], axis=-1),
        v=jnp.concatenate([vs[e] for e in order], axis=-1),
        ranks=_picked([node.ranks for node in row], order),
    )


def _blocks(factor: Any, ranks: Sequence[int]) -> list[jax.Array]:
    return jnp.split(factor, np.cumsum(ranks)[:-1], axis=-1)


def _picked(ranks: Sequence[Sequence[int]], order: Sequence[int]) -> tuple[int, ...]:
    every = [rank for part in ranks for rank in part]
    return tuple(every[e] for e in order)
