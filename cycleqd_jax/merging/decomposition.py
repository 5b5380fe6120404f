"""Singular directions of a stack of matrices from Gram matrices, and the report of what is lost."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

HIGHEST = jax.lax.Precision.HIGHEST
BOUNDARIES = (1e-2, 1e-4)


@dataclasses.dataclass(frozen=True)
class DecompositionReport:
    """What a decomposition kept, measured against the task vectors it was given.

    Attributes:
        ranks: leaf path -> directions kept, one number an expert.
        error: leaf path -> ``|tau - u v^T| / |tau|`` (Frobenius), shape (..., E) with the leaf's
            stacked layers first; 0 for a matrix that was not touched.
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
    """Singular value below which a direction drowns in the rounding of the weights: shape (...).

    Rounding to relative precision ``noise`` adds independent errors of about ``0.2 * noise *
    |w_ij|``. The norm of such a matrix is close to its largest row norm plus its largest column
    norm (Bandeira and van Handel, 2016, doi 10.1214/15-AOP1025); the factor 0.5 leaves a margin
    of 2.5.
    """
    return np.asarray(0.5 * noise * row_and_column_norms(weights), np.float32)


def row_and_column_norms(weights: Any) -> np.ndarray:
    """Largest row norm plus largest column norm of every matrix, shape (...), float32."""
    return np.asarray(_row_and_column_norms(jnp.asarray(weights)), np.float32)


def _matmul(a: Float[Array, "layers p q"], b: Float[Array, "layers q r"]) -> jax.Array:
    return jnp.matmul(a, b, precision=HIGHEST)


def _gram(tall: Float[Array, "layers p q"]) -> Float[Array, "layers q q"]:
    return jnp.matmul(jnp.swapaxes(tall, -1, -2), tall, precision=HIGHEST)


def _eigenvectors(gram: Float[Array, "layers q q"]) -> Float[Array, "layers q q"]:
    return jnp.flip(jnp.linalg.eigh(gram)[1], axis=-1)


def _decouple(
    gram: Float[Array, "layers q q"], small: Bool[Array, "layers q"]
) -> Float[Array, "layers q q"]:
    """Rotation that removes the couplings of a nearly diagonal Gram matrix to first order.

    Couplings of small directions to each other are left alone.
    """
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    gap = diagonal[:, None, :] - diagonal[:, :, None]
    # An angle above 0.01 is between directions of nearly equal size: there any rotation is as good.
    use = (jnp.abs(gram) < 0.01 * jnp.abs(gap)) & ~(small[:, :, None] & small[:, None, :])
    turn = jnp.eye(gram.shape[-1])[None] + jnp.where(use, gram / jnp.where(use, gap, 1.0), 0.0)
    for _ in range(2):  # Newton-Schulz: back to orthonormal columns
        turn = 1.5 * turn - 0.5 * _matmul(turn, _gram(turn))
    return turn


def _resolve(
    images: Float[Array, "layers p q"], small: Bool[Array, "layers q"]
) -> Float[Array, "layers q q"]:
    """Rotation that diagonalises the Gram matrix of the small directions, the last columns."""
    size = jnp.linalg.norm(images, axis=-2)
    largest = jnp.max(jnp.where(small, size, 0.0), axis=-1)[:, None, None]
    scaled = jnp.where(small[:, None, :], images / jnp.where(largest > 0, largest, 1.0), 0.0)
    identity = jnp.eye(images.shape[-1])[None]
    # Above any eigenvalue of the small block, so that the large directions keep the first places.
    ceiling = jnp.where(small, 0.0, 2.0 * images.shape[-1])[:, None, :] * identity
    found = _eigenvectors(_gram(scaled) + ceiling)
    both = small[:, :, None] & small[:, None, :]
    return jnp.where(both, found, jnp.where(small[:, None, :], 0.0, identity))


@jax.jit
def _directions(
    tall: Float[Array, "layers p q"],
) -> tuple[Float[Array, "layers q q"], Float[Array, "layers q"], Float[Array, " layers"]]:
    """Right singular vectors, singular values, largest first, and the matrices' norms.

    A Gram matrix squares the range of the singular values: its eigenvectors tell directions apart
    down to ``sqrt(eps)`` of the largest only. But in the basis found so far the Gram matrix is
    graded, its entries exact relative to the two columns they come from. So the directions below
    a boundary are decoupled from the larger ones and diagonalised again, scaled to themselves.
    Values are measured as ``|tau v_i|``; those below the noise may be out of order.
    """
    norm = jnp.sqrt(jnp.sum(jnp.square(tall), axis=(-1, -2), keepdims=True))
    tall = tall / jnp.where(norm > 0, norm, 1.0)
    place = jnp.arange(tall.shape[-1])[None]

    def refine(i: Any, vectors: jax.Array) -> jax.Array:
        images = _matmul(tall, vectors)
        values = jnp.linalg.norm(images, axis=-2)
        large = values >= jnp.asarray(BOUNDARIES, jnp.float32)[i] * values[:, :1]
        small = place >= jnp.sum(large, axis=-1, keepdims=True)
        vectors = _matmul(vectors, _decouple(_gram(images), small))
        return _matmul(vectors, _resolve(_matmul(tall, vectors), small))

    vectors = jax.lax.fori_loop(0, len(BOUNDARIES), refine, _eigenvectors(_gram(tall)))
    values = jnp.linalg.norm(_matmul(tall, vectors), axis=-2) * norm[..., 0]
    return vectors, values, norm[:, 0, 0]


def _relative_error(
    tall: Float[Array, "layers p q"],
    left: Float[Array, "layers p r"],
    right: Float[Array, "layers q r"],
) -> Float[Array, " layers"]:
    rest = tall - _matmul(left, jnp.swapaxes(right, -1, -2))
    norm = jnp.linalg.norm(tall, axis=(-1, -2))
    return jnp.where(norm > 0, jnp.linalg.norm(rest, axis=(-1, -2)) / norm, 0.0)


@jax.jit
def _project_all(
    tall: Float[Array, "layers p q"], right: Float[Array, "layers q q"]
) -> tuple[jax.Array, jax.Array, Float[Array, " layers"]]:
    left = _matmul(tall, right)
    return left, right, _relative_error(tall, left, right)


@jax.jit
def _project_leading(
    tall: Float[Array, "layers p q"], right: Float[Array, "layers q r"]
) -> tuple[jax.Array, jax.Array, Float[Array, " layers"]]:
    """Factors (p, r) and (q, r) of the leading directions, after a step of subspace iteration.

    Multiplying by tau once more shrinks the error of the subspace by the square of the gap to the
    dropped directions.
    """
    left, _ = jnp.linalg.qr(_matmul(tall, right))
    images = _matmul(jnp.swapaxes(tall, -1, -2), left)
    scale = jnp.sqrt(jnp.sum(jnp.square(images), axis=(-1, -2), keepdims=True))
    turn = _eigenvectors(_gram(images / jnp.where(scale > 0, scale, 1.0)))
    left, images = _matmul(left, turn), _matmul(images, turn)
    return left, images, _relative_error(tall, left, images)


def factorise(
    tau: Any, floor: np.ndarray, rank: int | None
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Rank-one terms ``tau = sum_i u_i v_i^T`` of one expert's matrices, largest first.

    Args:
        tau: (..., m, n); the leading axes are stacked layers.
        floor: (...) singular value at and below which a direction is dropped.
        rank: upper limit for the number of directions, or None.

    Returns:
        u (..., m, r), v (..., n, r), float32, with r the largest rank over the layers, and the
        relative reconstruction error (...).
    """
    tau = jnp.asarray(tau, jnp.float32)
    *batch, m, n = tau.shape
    layers = int(np.prod(batch, dtype=np.int64))
    stack = tau.reshape(layers, m, n)
    tall = stack if m >= n else jnp.swapaxes(stack, -1, -2)
    kept = 0
    touched = row_and_column_norms(tau) > 0
    if touched.any():
        vectors, values, norms = _directions(tall)
        # float32 arithmetic alone gives a direction tau does not have a size of about eps |tau|.
        own = np.finfo(np.float32).eps * np.asarray(norms)
        floors = np.maximum(np.reshape(floor, layers), own)
        above = np.flatnonzero((np.asarray(values) > floors[:, None]).any(axis=0))
        kept = int(above[-1]) + 1 if above.size else 0
        kept = kept if rank is None else min(kept, rank)
    if kept == 0:
        left = jnp.zeros((layers, tall.shape[1], 0), jnp.float32)
        right = jnp.zeros((layers, tall.shape[2], 0), jnp.float32)
        error = touched.astype(np.float32)
    elif kept == tall.shape[2]:
        left, right, error = _project_all(tall, vectors)
    else:
        left, right, error = _project_leading(tall, vectors[..., :kept])
    u, v = (left, right) if m >= n else (right, left)
    error = np.asarray(error).reshape(batch)
    return u.reshape(*batch, m, kept), v.reshape(*batch, n, kept), error
