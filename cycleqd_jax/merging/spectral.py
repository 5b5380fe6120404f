"""The spectral genotype space: a merged model as gains over the experts' singular directions.

Every matrix of expert e has a task vector ``tau_e = sum_i u_i v_i^T`` over its singular
directions (the singular value lives in one of the two factors). A genotype is one gain for each
direction,

    W(g) = W_0 + U diag(g) V^T,    U = [U_1 .. U_E] (m, R),    V = [V_1 .. V_E] (n, R),    R =
    sum_e r_e,

and one gain for each expert on vector leaves. Expert e is the indicator of its block, the base is
zero, and linear crossover and expert-SVD mutation never leave the space.

How the directions are found is in ``decomposition``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float

from cycleqd_jax.merging.decomposition import (
    HIGHEST,
    DecompositionReport,
    Method,
    check_method,
    factorise,
    noise_floor,
    row_and_column_norms,
)
from cycleqd_jax.merging.layout import GainLayout, LeafLayout
from cycleqd_jax.merging.task_vector import (
    ROLES,
    check_same_structure,
    check_same_tree,
    leaf_paths,
)

FLOAT32_EPS = float(np.finfo(np.float32).eps)


class MatrixFactors(struct.PyTreeNode):
    """Rank-one terms of all experts for one matrix leaf; block e is expert e's task vector.

    Attributes:
        u: (..., m, R) float32.
        v: (..., n, R) float32. Each direction's singular value is in u or in v; only the product
            matters.
        ranks: block sizes r_e, one an expert, with sum R; static. An untouched matrix has rank 0.
    """

    u: Any
    v: Any
    ranks: tuple[int, ...] = struct.field(pytree_node=False)


class VectorFactors(struct.PyTreeNode):
    """Task vectors of all experts for one vector leaf.

    Attributes:
        delta: (..., E, d) float32.
    """

    delta: Any


SpectralBasis = Any
"""Tree with the parameters' structure and ``MatrixFactors`` or ``VectorFactors`` for leaves."""


def is_factors(node: Any) -> bool:
    """Whether a node of a basis is one leaf's factors; the ``is_leaf`` of its tree functions."""
    return isinstance(node, MatrixFactors | VectorFactors)


def gain_layout(basis: SpectralBasis | GainLayout) -> GainLayout:
    """Static description of a basis's gains; a ``GainLayout`` passes through.

    Works on a basis of arrays, tracers or ``jax.ShapeDtypeStruct``.

    Raises:
        ValueError: a leaf is neither ``MatrixFactors`` nor ``VectorFactors``, or there is none.
    """
    if isinstance(basis, GainLayout):
        return basis
    nodes, treedef = jax.tree.flatten(basis, is_leaf=is_factors)
    leaves = []
    for node in nodes:
        if isinstance(node, MatrixFactors):
            leaves.append(LeafLayout("matrix", tuple(node.u.shape[:-2]), tuple(node.ranks)))
        elif isinstance(node, VectorFactors):
            *batch, experts, _ = node.delta.shape
            leaves.append(LeafLayout("vector", tuple(batch), (1,) * experts))
        else:
            raise ValueError(
                f"expected a tree of MatrixFactors and VectorFactors, found {type(node).__name__}"
            )
    if not leaves:
        raise ValueError("expected a basis with at least one leaf, found an empty tree")
    return GainLayout(treedef, tuple(leaves))


def _check_inputs(
    task_vectors: Sequence[Any], roles: Any, rank: int | None, base: Any | None
) -> None:
    if not task_vectors:
        raise ValueError("expected at least one task vector, found none")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be None (exact) or at least 1, found {rank}")
    for e, tau in enumerate(task_vectors[1:], start=1):
        check_same_tree(task_vectors[0], tau, "task vector 0", f"task vector {e}")
    check_same_structure(task_vectors[0], roles, "task vector 0", "the roles")
    if base is not None:
        check_same_tree(base, task_vectors[0], "the base", "task vector 0")
    columns = zip(*(jax.tree.leaves(tau) for tau in task_vectors), strict=True)
    for path, role, leaves in zip(leaf_paths(roles), jax.tree.leaves(roles), columns, strict=True):
        _check_leaf(path, role, leaves)


def _check_leaf(path: str, role: Any, leaves: Sequence[Any]) -> None:
    if role not in ROLES:
        raise ValueError(f"leaf '{path}': expected a role out of {ROLES}, found {role!r}")
    least = 2 if role == "matrix" else 1
    if jnp.ndim(leaves[0]) < least:
        raise ValueError(
            f"leaf '{path}': a {role} needs at least {least} axes, "
            f"found shape {jnp.shape(leaves[0])}"
        )
    for e, leaf in enumerate(leaves):
        # A matrix's norms are needed later anyway, so this compiles nothing more.
        sample = row_and_column_norms(leaf) if role == "matrix" else np.asarray(leaf, np.float32)
        if not np.isfinite(sample).all():
            raise ValueError(f"leaf '{path}' of task vector {e} has entries that are not finite")


def decompose(
    task_vectors: Sequence[Any],
    roles: Any,
    rank: int | None = None,
    *,
    base: Any | None = None,
    noise: float = FLOAT32_EPS,
    method: Method = "gram",
    mesh: Mesh | None = None,
) -> tuple[SpectralBasis, DecompositionReport]:
    """Singular directions of every expert's task vector, all layers of a leaf at once.

    With ``rank=None`` every direction above the rounding noise of the stored weights is kept,
    which is exact: what is dropped is smaller than the last bit of the weights it would be added
    to. A LoRA expert (a rank-r matrix added to float32 weights) so comes out at its own rank, and
    an untouched matrix at rank 0. The noise of a matrix W is taken from ``base``; without it only
    directions below the last bit of the task vector itself are dropped, and LoRA experts stay at
    full rank. A leaf has one rank an expert, the largest over its stacked layers.

    Args:
        task_vectors: E trees; matrix leaves (..., m, n), vector leaves (..., d). Any float dtype;
            the work is done in float32.
        roles: tree of the same structure of "matrix" | "vector".
        rank: keep at most this many directions of each matrix and expert; None keeps all.
        base: weights that the task vectors are added to (or their magnitudes), used for the noise
            only.
        noise: relative rounding error of the stored weights. The default, float32's, is exact for
            bfloat16 weights too. Pass ``jnp.finfo(jnp.bfloat16).eps`` for LoRA experts that were
            merged into bfloat16 weights: their rounding noise is dropped with everything that is
            hidden under it, and the report says how much that is.
        method: how the directions are found, see ``decomposition.Method``.
        mesh: the layers of every leaf are split over all its devices; None uses the default device.

    Returns:
        The basis, and a report of ranks and of what was dropped, measured against the given task
        vectors.

    Raises:
        ValueError: no task vectors, trees that differ, an unknown role, too few axes, an entry
            that is not finite, ``rank < 1``, or a method that is unknown or cannot serve here.
    """
    check_method(method, rank, mesh)
    _check_inputs(task_vectors, roles, rank, base)
    treedef: Any = jax.tree.structure(roles)
    role_leaves = jax.tree.leaves(roles)
    paths = leaf_paths(roles)
    columns = list(zip(*(jax.tree.leaves(tau) for tau in task_vectors), strict=True))
    weights = columns if base is None else [(w,) * len(task_vectors) for w in jax.tree.leaves(base)]
    nodes: list[Any] = []
    errors: dict[str, np.ndarray] = {}
    ranks: dict[str, tuple[int, ...]] = {}
    for path, role, taus, stored in zip(paths, role_leaves, columns, weights, strict=True):
        if role == "vector":
            stacked = jnp.stack([jnp.asarray(t, jnp.float32) for t in taus], axis=-2)
            nodes.append(VectorFactors(delta=stacked))
            continue
        blocks = [
            factorise(t, noise_floor(w, noise), rank, method=method, mesh=mesh)
            for t, w in zip(taus, stored, strict=True)
        ]
        errors[path] = np.stack([error for _, _, error in blocks], axis=-1)
        ranks[path] = tuple(int(u.shape[-1]) for u, _, _ in blocks)
        u = jnp.concatenate([u for u, _, _ in blocks], axis=-1)
        v = jnp.concatenate([v for _, v, _ in blocks], axis=-1)
        nodes.append(MatrixFactors(u=u, v=v, ranks=ranks[path]))
    return treedef.unflatten(nodes), DecompositionReport(ranks=ranks, error=errors)


def zero_gains(basis: SpectralBasis | GainLayout) -> Any:
    """Gains of the base model: matrix leaves (..., R), vector leaves (..., E), float32."""
    return gain_layout(basis).zeros()


def expert_gains(basis: SpectralBasis | GainLayout, expert: int | jax.Array) -> Any:
    """Gains of one expert, the indicator of its blocks; ``ValueError`` if it does not exist."""
    return gain_layout(basis).indicator(expert)


def uniform_gains(basis: SpectralBasis | GainLayout, lam: Any) -> Any:
    """Gains of task arithmetic ``theta_0 + lam * sum_e tau_e``; ``lam`` is a scalar."""
    return gain_layout(basis).full(lam)


def _weighted_outer(
    u: Float[Array, "*layers m r"], v: Float[Array, "*layers n r"], gains: Float[Array, "*layers r"]
) -> Float[Array, "*layers m n"]:
    """``sum_i g_i u_i v_i^T`` in the factors' own precision, summed in float32."""
    scaled = (u.astype(jnp.float32) * gains.astype(jnp.float32)[..., None, :]).astype(u.dtype)
    return jnp.matmul(
        scaled,
        jnp.swapaxes(v, -1, -2).astype(u.dtype),
        precision=HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _weighted_sum(
    delta: Float[Array, "*layers experts d"], gains: Float[Array, "*layers experts"]
) -> Float[Array, "*layers d"]:
    return jnp.einsum(
        "...e,...ed->...d",
        gains.astype(jnp.float32),
        delta.astype(jnp.float32),
        precision=HIGHEST,
    )


def expand(basis: SpectralBasis, gains: Any) -> Any:
    """Task vector of a genotype, float32: ``sum_i g_i u_i v_i^T`` or ``sum_e g_e delta_e``.

    Factors that were stored as bfloat16 are multiplied as bfloat16, with float32 sums.

    Pass the basis as an argument of the function you jit; a closure would embed it as a constant.
    For a population, ``jax.vmap(expand, in_axes=(None, 0))``.
    """

    def leaf(g: Any, factors: Any) -> jax.Array:
        if isinstance(factors, MatrixFactors):
            return _weighted_outer(factors.u, factors.v, g)
        return _weighted_sum(factors.delta, g)

    return jax.tree.map(leaf, gains, basis)


def materialise(base: Any, basis: SpectralBasis, gains: Any) -> Any:
    """Parameters of one genotype, ``base + expand(basis, gains)``: added in float32, base's dtype.

    A stacked leaf is built layer by layer inside its result: under ``jit``, what is alive besides
    arguments and result is one layer in float32. (XLA's CPU backend has no 16-bit writes into an
    array: there, for 16-bit weights, it is one leaf in float32.) Trees with their layers apart are
    built outside of ``jit``, a matrix at a time: one program has no bound on how many products in
    float32 are alive. For a population,
    ``jax.vmap(materialise, in_axes=(None, None, 0))``. `compile_materialise` is the jitted form.
    """
    return jax.tree.map(lambda b, g, f: _build(None, b, g, f), base, gains, basis)


def _build(old: Any, base: Any, gains: Any, factors: Any) -> jax.Array:
    base = jnp.asarray(base)
    if isinstance(factors, VectorFactors):
        return _build_vector(base, factors.delta, gains)
    if factors.u.shape[-1] == 0:
        return base
    if base.ndim == 2:
        return _build_matrix(base, factors.u, factors.v, gains)
    return _build_layers(old, base, factors.u, factors.v, gains)


@jax.jit  # outside jit too a leaf is one program, and no sum in float32 is left over
def _build_vector(base: jax.Array, delta: jax.Array, gains: jax.Array) -> jax.Array:
    return _add(base, _weighted_sum(delta, gains))


@jax.jit
def _build_matrix(base: jax.Array, u: jax.Array, v: jax.Array, gains: jax.Array) -> jax.Array:
    return _add(base, _weighted_outer(u, v, gains))


def _add(b: jax.Array, shift: jax.Array) -> jax.Array:
    return (b.astype(jnp.float32) + shift).astype(b.dtype)


@jax.jit  # a loop outside jit would be compiled again at every call
def _build_layers(
    old: Float[Array, "*layers m n"] | None,
    base: Float[Array, "*layers m n"],
    u: Float[Array, "*layers m r"],
    v: Float[Array, "*layers n r"],
    gains: Float[Array, "*layers r"],
) -> Float[Array, "*layers m n"]:
    """Base plus directions, written over ``old``; over the base itself where that is None."""
    *batch, m, n = base.shape
    count, rank = int(np.prod(batch, dtype=np.int64)), u.shape[-1]
    weights, us, vs = (x.reshape(count, *x.shape[-2:]) for x in (base, u, v))
    gs = gains.reshape(count, rank)

    def build(layer: Any, stack: jax.Array) -> jax.Array:
        sources = (stack if old is None else weights, us, vs, gs)
        b, *rest = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in sources)
        new = _add(b, _weighted_outer(*rest))
        return jax.lax.dynamic_update_index_in_dim(stack, new, layer, 0)

    # Carried, not put out by a scan: so the result may take the place of a donated array.
    start = weights if old is None else old.reshape(count, m, n)
    return jax.lax.fori_loop(0, count, build, start).reshape(base.shape)


def compile_materialise(base: Any, *, reuse: bool = False) -> Callable[..., Any]:
    """`materialise`, jitted, with every weight sharded as in the base.

    Args:
        base: parameters whose arrays say where the result's go.
        reuse: the function takes a model that is no longer needed as its first argument, the last
            child for example, and builds the new one in its memory. At most base, basis and one
            model are then alive, and no memory is asked of the system.

    Returns:
        ``(base, basis, gains) -> parameters``, or ``(old, base, basis, gains) -> parameters``.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, base)
    if not reuse:
        return jax.jit(materialise, out_shardings=shardings)
    return jax.jit(_rebuild, donate_argnums=0, keep_unused=True, out_shardings=shardings)


def _rebuild(old: Any, base: Any, basis: SpectralBasis, gains: Any) -> Any:
    return jax.tree.map(_build, old, base, gains, basis)
