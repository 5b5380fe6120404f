"""How alike task vectors are, matrix by matrix, before they are merged.

Per pair of experts: the cosine of their task vectors, the share of weights that both changed in the
same direction (the sign conflicts of TIES, Yadav et al., arXiv 2306.01708), and the similarity of
their singular spectra. The last is the cosine of the two vectors of singular values, each in
falling order: 1 for spectra of one shape whatever the directions are, smaller where one expert's
change is concentrated and the other's spread out.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.merging.low_rank import LowRank, is_low_rank
from cycleqd_jax.merging.spectral import MatrixFactors, SpectralBasis, gain_layout
from cycleqd_jax.merging.task_vector import check_same_structure, leaf_paths


@dataclasses.dataclass(frozen=True)
class LeafComparison:
    """One leaf's task vectors; leading axes (...) are stacked layers, E experts.

    Attributes:
        dot: (..., E, E) inner products of the task vectors; the diagonal holds squared norms.
        both: (..., E, E) weights that both experts changed.
        agree: (..., E, E) and in the same direction.
        base_square: (...) squared norm of the base's weights.
    """

    dot: np.ndarray
    both: np.ndarray
    agree: np.ndarray
    base_square: np.ndarray

    @property
    def norm(self) -> np.ndarray:
        """Norms of the task vectors (..., E)."""
        return np.sqrt(np.diagonal(self.dot, axis1=-2, axis2=-1))

    @property
    def cosine(self) -> np.ndarray:
        """Cosines (..., E, E); NaN where an expert did not change the leaf."""
        norm = self.norm
        return _ratio(self.dot, norm[..., :, None] * norm[..., None, :])

    @property
    def sign_agreement(self) -> np.ndarray:
        """Share of the weights both changed that moved the same way (..., E, E); NaN for none."""
        return _ratio(self.agree, self.both)


def compare_task_vectors(
    base: Any, experts: Sequence[Any], roles: Any
) -> dict[str, LeafComparison]:
    """Compare the experts' task vectors leaf by leaf, one layer at a time.

    Args:
        base: parameters of the base.
        experts: per expert its parameters (the task vector is their difference to the base), or a
            task vector with a `LowRank` for every matrix and an array for every vector.
        roles: tree of the parameters' structure of "matrix" | "vector".

    Returns:
        Leaf path -> comparison.

    Raises:
        ValueError: trees that differ; the message names the leaf.
    """
    flat = []
    for e, expert in enumerate(experts):
        leaves = jax.tree.leaves(expert, is_leaf=is_low_rank)
        treedef: Any = jax.tree.structure(expert, is_leaf=is_low_rank)
        check_same_structure(roles, treedef.unflatten([0] * len(leaves)), "roles", f"expert {e}")
        updates = any(map(is_low_rank, leaves))
        flat.append([(leaf, updates) for leaf in leaves])
    check_same_structure(roles, base, "roles", "the base")
    rows = zip(leaf_paths(roles), jax.tree.leaves(roles), jax.tree.leaves(base), *flat, strict=True)
    return {path: _compare(role, weights, leaves) for path, role, weights, *leaves in rows}


def total(comparisons: Mapping[str, LeafComparison]) -> LeafComparison:
    """The comparison of whole models: all leaves and layers together."""

    def add(name: str, axes: int) -> np.ndarray:
        parts = [getattr(leaf, name) for leaf in comparisons.values()]
        flat = [part.reshape(-1, *part.shape[part.ndim - axes :]) for part in parts]
        return np.asarray(np.concatenate(flat).sum(axis=0))

    return LeafComparison(add("dot", 2), add("both", 2), add("agree", 2), add("base_square", 0))


def spectral_similarity(basis: SpectralBasis) -> dict[str, np.ndarray]:
    """Similarity of the experts' singular spectra, per matrix leaf (..., E, E).

    The cosine of two experts' singular values in falling order, the shorter list filled up with
    zeros; of the directions that the basis keeps. NaN where an expert did not change a matrix.
    """
    layout = gain_layout(basis)
    nodes = layout.treedef.flatten_up_to(basis)
    paths = leaf_paths(layout.build(lambda i, _: i))
    found = {}
    for path, node, leaf in zip(paths, nodes, layout.leaves, strict=True):
        if not isinstance(node, MatrixFactors):
            continue
        # The singular value of a direction lies in one of its two factors.
        size = np.asarray(
            jnp.linalg.norm(node.u, axis=-2) * jnp.linalg.norm(node.v, axis=-2), np.float64
        )
        spectra = np.zeros((*leaf.batch_shape, len(leaf.ranks), max(leaf.ranks, default=0)))
        for e, block in enumerate(leaf.blocks):
            spectra[..., e, : leaf.ranks[e]] = -np.sort(-size[..., block], axis=-1)
        dot = spectra @ np.swapaxes(spectra, -1, -2)
        norm = np.sqrt(np.diagonal(dot, axis1=-2, axis2=-1))
        found[path] = _ratio(dot, norm[..., :, None] * norm[..., None, :])
    return found


def _compare(role: str, weights: Any, leaves: Sequence[tuple[Any, bool]]) -> LeafComparison:
    lead = weights.shape[: weights.ndim - (2 if role == "matrix" else 1)]
    # A vector of an expert given by updates is an update too, not a weight.
    updates = tuple(flag for _, flag in leaves)
    *tables, square = _layers(weights, tuple(leaf for leaf, _ in leaves), updates, len(lead))
    shape = (*lead, len(leaves), len(leaves))
    dot, both, agree = (np.asarray(table, np.float64).reshape(shape) for table in tables)
    return LeafComparison(dot, both, agree, np.asarray(square, np.float64).reshape(lead))


@partial(jax.jit, static_argnames=("updates", "lead"))
def _layers(weights: Any, leaves: tuple[Any, ...], updates: tuple[bool, ...], lead: int) -> Any:
    """The sums of every layer, one layer's task vectors in memory at a time."""
    layers = math.prod(weights.shape[:lead])
    flat = jax.tree.map(lambda x: jnp.reshape(x, (layers, *x.shape[lead:])), (weights, leaves))
    return jax.lax.map(lambda layer: _one_layer(layer[0], layer[1], updates), flat)


def _sum(values: jax.Array) -> jax.Array:
    """Sum in two steps: one float32 accumulator over 10^8 weights would lose the small ones."""
    return jnp.sum(jnp.sum(values, axis=-1, dtype=jnp.float32))


def _one_layer(
    weights: Any, leaves: tuple[Any, ...], updates: tuple[bool, ...]
) -> tuple[jax.Array, ...]:
    base = weights.astype(jnp.float32)

    def change(leaf: Any, is_update: bool) -> jax.Array:
        if isinstance(leaf, LowRank):
            left, right = (side.astype(jnp.float32) for side in (leaf.left, leaf.right))
            return jnp.matmul(left, right.T, precision=jax.lax.Precision.HIGHEST)
        return leaf.astype(jnp.float32) - (0.0 if is_update else base)

    taus = [change(leaf, flag) for leaf, flag in zip(leaves, updates, strict=True)]
    count = len(taus)
    dot, both, agree = (np.zeros((count, count), object) for _ in range(3))
    for i, j in itertools.combinations_with_replacement(range(count), 2):
        signs = jnp.sign(taus[i]) * jnp.sign(taus[j])
        dot[i, j] = dot[j, i] = _sum(taus[i] * taus[j])
        both[i, j] = both[j, i] = _sum((signs != 0).astype(jnp.float32))
        agree[i, j] = agree[j, i] = _sum((signs > 0).astype(jnp.float32))
    tables = [jnp.array(table.tolist(), jnp.float32) for table in (dot, both, agree)]
    return *tables, _sum(base * base)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan)
