"""How alike task vectors are, matrix by matrix, before they are merged.

Per pair of experts: the cosine of their task vectors, the share of weights that both changed in the
same direction (the sign conflicts of TIES, Yadav et al., arXiv 2306.01708), and the similarity of
their singular spectra. The last is the cosine of the two vectors of singular values, each in
falling order: 1 for spectra of one shape whatever the directions are, smaller where one expert's
change is concentrated and the other's spread out.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.merging.decomposition import HIGHEST
from cycleqd_jax.merging.low_rank import LowRank, is_low_rank
from cycleqd_jax.merging.spectral import MatrixFactors, SpectralBasis, gain_layout
from cycleqd_jax.merging.task_vector import check_same_structure, leaf_paths

# Weights of a block: few enough to be counted exactly in float32.
_BLOCK = 1 << 22


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
    *rows, width = weights.shape[len(lead) :]
    height = rows[0] if rows else 1
    fits = [n for n in range(1, height + 1) if height % n == 0 and n * width <= _BLOCK]
    # A vector of an expert given by updates is an update too, not a weight.
    updates = tuple(flag for _, flag in leaves)
    found = _sums(
        weights,
        tuple(leaf for leaf, _ in leaves),
        updates=updates,
        layers=math.prod(lead),
        height=height,
        block=max(fits, default=1),
    )
    dot, signs, both, square = (np.asarray(x, np.float64).sum(axis=1) for x in found)
    shape = (*lead, len(leaves), len(leaves))
    return LeafComparison(
        dot=dot.reshape(shape),
        both=both.reshape(shape),
        agree=((both + signs) / 2).reshape(shape),
        base_square=square.reshape(lead),
    )


@partial(jax.jit, static_argnames=("updates", "layers", "height", "block"))
def _sums(
    weights: Any,
    leaves: tuple[Any, ...],
    *,
    updates: tuple[bool, ...],
    layers: int,
    height: int,
    block: int,
) -> tuple[jax.Array, ...]:
    """Sums over every block of rows of every layer: three (layers, blocks, E, E), (layers, blocks).

    They are the products of the task vectors, of their signs, of the signs' absolute values, and
    the base's square. One block's task vectors are in memory at a time: those of a whole embedding
    would take more room than the models.
    """

    def one_block(parts: tuple[Any, ...], rights: tuple[Any, ...]) -> tuple[jax.Array, ...]:
        base, *others = (part.astype(jnp.float32) for part in parts)
        taus = [
            _matmul(part, right.T) if right is not None else part if is_update else part - base
            for part, right, is_update in zip(others, rights, updates, strict=True)
        ]
        flat = jnp.stack([tau.reshape(-1) for tau in taus])
        signs = jnp.sign(flat)
        tables = [_matmul(x, x.T) for x in (flat, signs, jnp.abs(signs))]
        return *tables, jnp.sum(base * base)

    def one_layer(layer: tuple[Any, tuple[Any, ...]]) -> tuple[jax.Array, ...]:
        base, own = layer
        low_rank = [is_low_rank(leaf) for leaf in own]
        rights = tuple(
            leaf.right.astype(jnp.float32) if low else None
            for leaf, low in zip(own, low_rank, strict=True)
        )
        tall = [leaf.left if low else leaf for leaf, low in zip(own, low_rank, strict=True)]
        parts = tuple(x.reshape(height // block, block, x.shape[-1]) for x in (base, *tall))
        return jax.lax.map(lambda part: one_block(part, rights), parts)

    def by_layer(leaf: Any) -> Any:
        if is_low_rank(leaf):
            return LowRank(*(x.reshape(layers, *x.shape[-2:]) for x in (leaf.left, leaf.right)))
        return jnp.reshape(leaf, (layers, height, leaf.shape[-1]))

    return jax.lax.map(one_layer, (by_layer(weights), tuple(by_layer(leaf) for leaf in leaves)))


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=HIGHEST)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan)
