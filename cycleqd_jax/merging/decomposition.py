"""Singular directions of one stack of matrices from a Gram matrix, and the report of what was dropped."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class DecompositionReport:
    """What a decomposition kept, measured against the task vectors it was given.

    Attributes:
        ranks: leaf path -> directions kept, one number an expert.
        error: leaf path -> ``|tau - u v^T| / |tau|`` (Frobenius), shape (..., E) with the leaf's stacked layers
            first; 0 for a matrix that was not touched.
    """

    ranks: Mapping[str, tuple[int, ...]]
    error: Mapping[str, np.ndarray]

    @property
    def energy(self) -> dict[str, np.ndarray]:
        """Leaf path -> retained energy ``1 - error^2``, shape (..., E)."""
        return {path: 1.0 - error.astype(np.float64) ** 2 for path, error in self.error.items()}

    def minimum(self) -> float:
        """Least retained energy of any matrix of any expert; 1 when there is no matrix."""
        return float(min((e.min() for e in self.energy.values() if e.size), default=1.0))

    def mean(self) -> float:
        """Mean retained energy over matrices and experts; 1 when there is no matrix."""
        values = [e.ravel() for e in self.energy.values() if e.size]
        return float(np.concatenate(values).mean()) if values else 1.0


@jax.jit
def _row_and_column_norms(w: Float[Array, "*layers m n"]) -> Float[Array, "*layers"]:
    square = jnp.square(w.astype(jnp.float32))
    rows = jnp.max(jnp.sum(square, axis=-1), axis=-1, initial=0.0)
    columns = jnp.max(jnp.sum(square, axis=-2), axis=-1, initial=0.0)
    return jnp.sqrt(rows) + jnp.sqrt(columns)


def noise_floor(weights: Any, noise: float) -> np.ndarray:
    """Singular value below which a direction drowns in the rounding of the weights, one a layer, shape (...).

    Rounding to relative precision ``noise`` adds independent errors of about ``0.2 * noise * |w_ij|``. The norm of
    such a matrix is close to its largest row norm plus its largest column norm (Bandeira and van Handel, 2016,
    doi 10.1214/15-AOP1025); the factor 0.5 leaves a margin of 2.5.
    """
    return 0.5 * noise * np.asarray(_row_and_column_norms(jnp.asarray(weights)), np.float32)


def _descending(
    vectors: Float[Array, "layers s r"], size: Float[Array, "layers r"]
) -> tuple[Float[Array, "layers s r"], Float[Array, "layers r"]]:
    order = jnp.argsort(-size, axis=-1)
    return (
        jnp.take_along_axis(vectors, order[:, None, :], axis=-1),
        jnp.take_along_axis(size, order, axis=-1),
    )


def _gram_eigenvectors(tall: Float[Array, "layers p q"]) -> Float[Array, "layers q q"]:
    gram = jnp.einsum("lpi,lpj->lij", tall, tall, precision=HIGHEST)
    return jnp.linalg.eigh(gram)[1]


@jax.jit
def _directions(
    tall: Float[Array, "layers p q"],
) -> tuple[Float[Array, "layers q q"], Float[Array, "layers q"]]:
    """Right singular vectors and singular values, largest first.

    The values are measured as ``|tau v_i|``, not taken from the eigenvalues: those are wrong below
    ``sqrt(eps)`` of the largest, exactly where the noise floor is looked for.
    """
    norm = jnp.sqrt(jnp.sum(jnp.square(tall), axis=(-1, -2), keepdims=True))
    vectors = _gram_eigenvectors(tall / jnp.where(norm > 0, norm, 1.0))
    images = jnp.einsum("lpq,lqr->lpr", tall, vectors, precision=HIGHEST)
    return _descending(vectors, jnp.linalg.norm(images, axis=-2))


@jax.jit
def _project_all(
    tall: Float[Array, "layers p q"], right: Float[Array, "layers q q"]
) -> tuple[Float[Array, "layers p q"], Float[Array, "layers q q"]]:
    return jnp.einsum("lpq,lqr->lpr", tall, right, precision=HIGHEST), right


@jax.jit
def _project_leading(
    tall: Float[Array, "layers p q"], right: Float[Array, "layers q r"]
) -> tuple[Float[Array, "layers p r"], Float[Array, "layers q r"]]:
    """Factors of the leading directions, sharpened by one step of subspace iteration.

    The Gram matrix finds the leading subspace only to ``eps * (s_1 / s_r)``; multiplying by tau once more shrinks
    that error by the square of the gap to the dropped directions.
    """
    left, _ = jnp.linalg.qr(jnp.einsum("lpq,lqr->lpr", tall, right, precision=HIGHEST))
    images = jnp.einsum("lpq,lpr->lqr", tall, left, precision=HIGHEST)
    scale = jnp.sqrt(jnp.sum(jnp.square(images), axis=(-1, -2), keepdims=True))
    turn = _gram_eigenvectors(images / jnp.where(scale > 0, scale, 1.0))
    turn = jnp.flip(turn, axis=-1)
    return (
        jnp.einsum("lpr,lrs->lps", left, turn, precision=HIGHEST),
        jnp.einsum("lqr,lrs->lqs", images, turn, precision=HIGHEST),
    )


@jax.jit
def _relative_error(
    tall: Float[Array, "layers p q"],
    left: Float[Array, "layers p r"],
    right: Float[Array, "layers q r"],
) -> Float[Array, "layers"]:
    rest = tall - jnp.einsum("lpr,lqr->lpq", left, right, precision=HIGHEST)
    norm = jnp.linalg.norm(tall, axis=(-1, -2))
    return jnp.where(norm > 0, jnp.linalg.norm(rest, axis=(-1, -2)) / norm, 0.0)


def factorise(
    tau: Any, floor: np.ndarray, rank: int | None
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Rank-one terms ``tau = sum_i u_i v_i^T`` of one expert's matrices, largest first.

    Args:
        tau: (..., m, n); the leading axes are stacked layers.
        floor: (...) singular value at and below which a direction is dropped.
        rank: upper limit for the number of directions, or None.

    Returns:
        u (..., m, r), v (..., n, r), float32, with r the largest rank over the layers, and the relative
        reconstruction error (...).
    """
    tau = jnp.asarray(tau, jnp.float32)
    *batch, m, n = tau.shape
    layers = int(np.prod(batch, dtype=np.int64))
    stack = tau.reshape(layers, m, n)
    tall = stack if m >= n else jnp.swapaxes(stack, -1, -2)
    kept = 0
    if layers and bool(jnp.any(stack != 0)):
        vectors, values = _directions(tall)
        kept = int((np.asarray(values) > np.reshape(floor, (layers, 1))).sum(axis=-1).max())
        kept = kept if rank is None else min(kept, rank)
    if kept == 0:
        left = jnp.zeros((layers, tall.shape[1], 0), jnp.float32)
        right = jnp.zeros((layers, tall.shape[2], 0), jnp.float32)
    elif kept == tall.shape[2]:
        left, right = _project_all(tall, vectors)
    else:
        left, right = _project_leading(tall, vectors[..., :kept])
    error = np.asarray(_relative_error(tall, left, right)).reshape(batch)
    u, v = (left, right) if m >= n else (right, left)
    return u.reshape(*batch, m, kept), v.reshape(*batch, n, kept), error
