"""What stands in place of a weight, and the products that serve every kind of it.

A matrix is an array, or a `SpectralKernel` that holds a whole population of matrices as gains on
shared directions, or a `StackedKernel` that holds every one of them. A norm vector is an array or a
`CandidateVector`. The model calls `project`, `embed`, `unembed` and `norm_weight` and never asks
which kind it got; `lax.scan` and `vmap` need no second code path, since all of them are pytrees.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from cycleqd_jax.merging.spectral import MatrixFactors, VectorFactors, materialise


class SpectralKernel(flax.struct.PyTreeNode):
    """Matrices W(g) = base + u diag(g) vᵀ of many candidates, none of them built.

    `base` (..., in, out), `u` (..., in, R), `v` (..., out, R), `gain` (..., C, R) with one row per
    candidate, or per batch row after `per_row`, or (..., R) for a single candidate. Leading axes
    are stacked layers.
    """

    base: Any
    u: Any
    v: Any
    gain: Any


class StackedKernel(flax.struct.PyTreeNode):
    """The built matrices of many candidates: `values` (..., C, in, out).

    Without row numbers the batch consists of C equal blocks, block c of candidate c, and a product
    is one batched product that reads every matrix once. With row numbers every row gathers its own
    matrix, which is meant for a few rows.
    """

    values: Any


class CandidateVector(flax.struct.PyTreeNode):
    """The same norm vector of many candidates: `values` (..., C, d), or (..., d) for one."""

    values: Any


def project(
    x: Float[Array, "batch time inner"], kernel: Any, rows: Int[Array, " batch"] | None = None
) -> Float[Array, "batch time outer"]:
    """The product y = x W; of a `SpectralKernel` y = x W0 + ((x U) ⊙ g[row's candidate]) Vᵀ.

    `rows` gives the candidate of every batch row. None means one candidate for all rows, or
    gains that already have one row per batch row.
    """
    if isinstance(kernel, StackedKernel):
        return _stacked_product(x, kernel.values, rows)
    if not isinstance(kernel, SpectralKernel):
        return _product(x, kernel)
    y = x @ kernel.base
    if kernel.u.shape[-1] == 0:
        return y
    return y + (_scale(x @ kernel.u, kernel.gain, rows) @ kernel.v.T)


def embed(
    tokens: Int[Array, "batch time"], kernel: Any, rows: Int[Array, " batch"] | None = None
) -> Float[Array, "batch time hidden"]:
    """Rows of the embedding matrix (vocab, hidden), each in its candidate's version."""
    if isinstance(kernel, StackedKernel):
        count = kernel.values.shape[0]
        if rows is None:
            rows = jnp.repeat(jnp.arange(count), tokens.shape[0] // count)
        return kernel.values[rows[:, None], tokens]
    if not isinstance(kernel, SpectralKernel):
        return kernel[tokens]
    y = kernel.base[tokens]
    if kernel.u.shape[-1] == 0:
        return y
    return y + (_scale(kernel.u[tokens], kernel.gain, rows) @ kernel.v.T)


def unembed(
    x: Float[Array, "batch time hidden"],
    embedding: Any,
    head: Any,
    rows: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch time vocab"]:
    """Logits from `head` (hidden, vocab), or from the `embedding` where `head` is None (tied)."""
    if head is not None:
        return project(x, head, rows)
    if isinstance(embedding, StackedKernel):
        return _stacked_product(x, jnp.swapaxes(embedding.values, -1, -2), rows)
    if not isinstance(embedding, SpectralKernel):
        return x @ embedding.T
    y = x @ embedding.base.T
    if embedding.u.shape[-1] == 0:
        return y
    return y + (_scale(x @ embedding.v, embedding.gain, rows) @ embedding.u.T)


def norm_weight(weight: Any, rows: Int[Array, " batch"] | None = None) -> Float[Array, "..."]:
    """A norm's weight in a form that multiplies (batch, time, d): (d,) or (batch, 1, d)."""
    if not isinstance(weight, CandidateVector):
        return weight
    return _per_row(weight.values, rows)


def attach(params: Any, basis: Any, gains: Any) -> Any:
    """Parameters of a whole population: weights become kernels, nothing is materialised.

    `gains` has the structure of `params` with leaves (C, ..., R) for matrices and (C, ..., E) for
    vectors, C candidates in front; the candidate axis moves behind the layer axis, so that
    `lax.scan` over layers slices the kernels. Equals `materialise` of each candidate.

    Outside of `jit` the kernels hold the arrays of `params`, and those of a basis in the weights'
    dtype (`round_directions`), and not copies, which a jitted function would return.
    """
    return jax.tree.map(
        _kernel, params, round_directions(basis, params), _own(params, basis, gains)
    )


def round_directions(basis: Any, params: Any) -> Any:
    """The basis with its directions in the dtype of the weights, in which products run.

    They are stored in float32; of float32 weights the arrays are the same.
    """

    def leaf(base: Any, factors: Any) -> Any:
        if not isinstance(factors, MatrixFactors) or factors.u.dtype == base.dtype:
            return factors
        return factors.replace(u=factors.u.astype(base.dtype), v=factors.v.astype(base.dtype))

    return jax.tree.map(leaf, params, basis)


def _kernel(base: Any, factors: Any, own: Array) -> Any:
    if isinstance(factors, MatrixFactors):
        return SpectralKernel(base=base, u=factors.u, v=factors.v, gain=own)
    return CandidateVector(values=own)


@jax.jit
def _own(params: Any, basis: Any, gains: Any) -> Any:
    """What is the candidates' own: gains of matrices (..., C, R), values of vectors (..., C, d)."""

    def leaf(base: Any, factors: Any, gain: Any) -> Array:
        candidates = jnp.moveaxis(gain, 0, -2)
        if isinstance(factors, MatrixFactors):
            return candidates
        if isinstance(factors, VectorFactors):
            shift = candidates @ factors.delta
            return (base[..., None, :].astype(jnp.float32) + shift).astype(base.dtype)
        raise ValueError(
            "attach expects a basis of MatrixFactors and VectorFactors, "
            f"got {type(factors).__name__}"
        )

    return jax.tree.map(leaf, params, basis, gains)


def stack(models: Sequence[Any], roles: Any) -> Any:
    """One tree of the built weights of many candidates, all of one structure.

    `roles` is a tree of "matrix" | "vector" of the same structure. Raises ValueError without
    models.
    """
    if not models:
        raise ValueError("stack: expected at least one model, found none")

    def leaf(role: str, *weights: Any) -> Any:
        if role == "matrix":
            return StackedKernel(values=jnp.stack(weights, axis=-3))
        return CandidateVector(values=jnp.stack(weights, axis=-2))

    return jax.tree.map(leaf, roles, *models)


def per_row(params: Any, rows: Int[Array, " batch"]) -> Any:
    """Pick every batch row's gains once, before a decoding loop, so that no step gathers them.

    The result is used with `rows=None`. Stacked weights stay as they are: their rows are in blocks.
    """

    def leaf(node: Any) -> Any:
        if isinstance(node, SpectralKernel):
            return node.replace(gain=jnp.take(node.gain, rows, axis=-2))
        if isinstance(node, CandidateVector):
            return node.replace(values=jnp.take(node.values, rows, axis=-2))
        return node

    return jax.tree.map(leaf, params, is_leaf=is_kernel)


def materialise_candidate(params: Any, candidate: Int[Array, ""]) -> Any:
    """Plain weights W(g) of one candidate of attached parameters, accumulated in float32."""

    def leaf(node: Any) -> Any:
        if isinstance(node, CandidateVector):
            return jnp.take(node.values, candidate, axis=-2)
        if isinstance(node, StackedKernel):
            return jnp.take(node.values, candidate, axis=-3)
        if not isinstance(node, SpectralKernel):
            return node
        factors = MatrixFactors(u=node.u, v=node.v, ranks=(node.u.shape[-1],))
        return materialise(node.base, factors, jnp.take(node.gain, candidate, axis=-2))

    return jax.tree.map(leaf, params, is_leaf=is_kernel)


def num_candidates(params: Any) -> int | None:
    """How many candidates the kernels of `params` hold; None for plain weights."""
    for node in jax.tree.leaves(params, is_leaf=is_kernel):
        if isinstance(node, SpectralKernel):
            return int(node.gain.shape[-2])
        if isinstance(node, CandidateVector):
            return int(node.values.shape[-2])
        if isinstance(node, StackedKernel):
            return int(node.values.shape[-3])
    return None


def is_stacked(params: Any) -> bool:
    """Whether the weights are `StackedKernel`s, so that batches must consist of equal blocks."""
    return any(
        isinstance(node, StackedKernel) for node in jax.tree.leaves(params, is_leaf=is_kernel)
    )


def spectral_share(params: Any) -> float:
    """Multiplications of the low-rank products over those of the dense ones, per token."""
    dense = low_rank = 0
    for node in jax.tree.leaves(params, is_leaf=is_kernel):
        if isinstance(node, SpectralKernel):
            dense += node.base.size
            low_rank += node.u.size + node.v.size
    return low_rank / dense if dense else 0.0


def is_kernel(node: Any) -> bool:
    """Whether a node of the parameters is one of this module's kernels (an `is_leaf`)."""
    return isinstance(node, SpectralKernel | StackedKernel | CandidateVector)


@jax.custom_vjp
def _product(x: Array, weight: Array) -> Array:
    """The product of x (batch, time, in) and weight (in, out)."""
    return x @ weight


def _product_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ weight, (x, weight)


def _product_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    # The stock rule asks for (dyᵀ x)ᵀ, and XLA's CPU backend then fuses the transposition into the
    # elementwise code before it, which is slow strided code. The barrier and the order of
    # operands keep dy as it is: a training step took 0.8 times the processor time.
    x, weight = saved
    dy = lax.optimization_barrier(dy)
    axes = tuple(range(x.ndim - 1))
    return dy @ weight.T, lax.dot_general(x, dy, ((axes, axes), ((), ())))


_product.defvjp(_product_forward, _product_backward)


def _stacked_product(x: Array, values: Array, rows: Array | None) -> Array:
    """X (batch, time, in) times each row's matrix out of (C, in, out)."""
    if rows is not None:
        return x @ values[rows]
    count = values.shape[0]
    blocks = x.reshape(count, -1, x.shape[-1])
    return (blocks @ values).reshape(*x.shape[:-1], values.shape[-1])


def _per_row(values: Array, rows: Array | None) -> Array:
    """(d,) as it is; (C, d) as (batch, 1, d)."""
    if values.ndim == 1:
        return values
    return (values if rows is None else values[rows])[:, None, :]


def _scale(hidden: Array, gain: Array, rows: Array | None) -> Array:
    return hidden * _per_row(gain, rows).astype(hidden.dtype)
