"""Singular directions of a stack of matrices by one of three methods, and what they leave out.

Only one orthonormal factor is ever computed. With V orthonormal, ``tau V`` rebuilds tau to rounding
for *any* V that spans its rows; that V holds the singular vectors, in order, is what truncation,
the detection of an expert's rank and the meaning of a gain need.
"""

import contextlib
import dataclasses
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float
from threadpoolctl import threadpool_limits

Method = Literal["gram", "svd", "randomized"]
"""How directions are found.

- "gram": eigenvectors of the smaller Gram matrix. It squares the range of the singular values, so
  it is formed and solved in float64: directions down to 1e-8 of the largest stay apart, which is
  below float32's own rounding of the matrix. The default; several times faster than an SVD.
- "svd": LAPACK's or cuSOLVER's singular value decomposition, in float32.
- "randomized": subspace iteration from a random sketch (Halko, Martinsson and Tropp, 2011,
  arXiv 0909.4061), for a rank far below full. Directions whose singular values are close to the
  first dropped one may be mixed with it; the report says what is kept.
"""

METHODS: tuple[Method, ...] = get_args(Method)
HIGHEST = jax.lax.Precision.HIGHEST
OVERSAMPLING = 16
POWER_ITERATIONS = 3


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


def factorise(
    tau: Any,
    floor: np.ndarray,
    rank: int | None,
    *,
    method: Method = "gram",
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Rank-one terms ``tau = sum_i u_i v_i^T`` of one expert's matrices, largest first.

    Args:
        tau: (..., m, n); the leading axes are stacked layers.
        floor: (...) singular value at and below which a direction is dropped.
        rank: upper limit for the number of directions, or None.
        method: how the directions are found.
        mesh: the layers are split over all its devices; None works through them on one device, on
            a CPU as many at a time as there are cores.

    Returns:
        u (..., m, r), v (..., n, r), float32, with r the largest rank over the layers, and the
        relative reconstruction error (...). The factor of the shorter side (u of a square
        matrix) is orthonormal, the other one carries the singular values.

    Raises:
        ValueError: an unknown method, "randomized" without a rank, "gram" on a TPU.
    """
    check_method(method, rank, mesh)
    tau = jnp.asarray(tau, jnp.float32)
    *batch, m, n = tau.shape
    layers, wide = int(np.prod(batch, dtype=np.int64)), m <= n
    stack = tau.reshape(layers, m, n)
    long, short = max(m, n), min(m, n)
    kept = 0
    touched = row_and_column_norms(tau) > 0
    if touched.any():
        limit = short if rank is None else min(rank, short)
        vectors, values, norms = _over_layers(
            _directions, (stack,), mesh, method=method, wide=wide, limit=limit
        )
        # float32 arithmetic alone gives a direction tau does not have a size of about eps |tau|.
        own = np.finfo(np.float32).eps * np.asarray(norms)
        floors = np.maximum(np.reshape(floor, layers), own)
        above = np.flatnonzero((np.asarray(values) > floors[:, None]).any(axis=0))
        kept = int(above[-1]) + 1 if above.size else 0
    if kept == 0:
        left = jnp.zeros((layers, long, 0), jnp.float32)
        right = jnp.zeros((layers, short, 0), jnp.float32)
        error = touched.astype(np.float32)
    else:
        right = vectors[..., :kept]
        left, error = _over_layers(_images, (stack, right), mesh, wide=wide)
    u, v = (right, left) if wide else (left, right)
    error = np.asarray(error).reshape(batch)
    return u.reshape(*batch, m, kept), v.reshape(*batch, n, kept), error


def check_method(method: Any, rank: int | None, mesh: Mesh | None) -> None:
    """Raise ValueError for a method that does not exist, or that cannot serve here."""
    if method not in METHODS:
        raise ValueError(f"expected a method out of {METHODS}, found {method!r}")
    if method == "randomized" and rank is None:
        raise ValueError("method 'randomized' needs a rank, found None; 'gram' finds every rank")
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    host_chosen = mesh is None and _default_device() is not None
    if method == "gram" and platform == "tpu" and not host_chosen:
        raise ValueError(
            "method 'gram' needs float64, which a TPU does not have: pass method='svd', or "
            "decompose on the host, inside `with jax.default_device(jax.devices('cpu')[0])`"
        )


@functools.partial(jax.jit, static_argnames=("method", "wide", "limit"))
def _directions(
    matrix: Float[Array, "m n"], *, method: Method, wide: bool, limit: int
) -> tuple[Float[Array, "q r"], Float[Array, " r"], Float[Array, ""]]:
    """Leading singular vectors of the shorter side, their singular values, and the norm."""
    tall = matrix.T if wide else matrix
    if method == "gram":
        vectors, values = _gram_directions(tall)
    elif method == "svd":
        _, values, rows = jnp.linalg.svd(tall, full_matrices=False)
        vectors = rows.T
    else:
        vectors, values = _sketched_directions(tall, limit)
    norm = jnp.linalg.norm(matrix.astype(jnp.float64)).astype(jnp.float32)
    return vectors[:, :limit], values[:limit], norm


def _gram_directions(
    tall: Float[Array, "p q"],
) -> tuple[Float[Array, "q q"], Float[Array, " q"]]:
    # Rows times rows, of a copy with contiguous rows: on a CPU this product is twice as fast.
    rows = jax.lax.optimization_barrier(tall.T).astype(jnp.float64)
    squares, vectors = jnp.linalg.eigh(rows @ rows.T, symmetrize_input=False)
    values = jnp.sqrt(jnp.maximum(squares, 0.0))
    return vectors[:, ::-1].astype(jnp.float32), values[::-1].astype(jnp.float32)


def _sketched_directions(
    tall: Float[Array, "p q"], rank: int
) -> tuple[Float[Array, "q r"], Float[Array, " r"]]:
    """Subspace iteration; the sketch's key is fixed, so that the same matrix gives the same."""
    columns = min(rank + OVERSAMPLING, tall.shape[1])
    sketch = jax.random.normal(jax.random.key(0), (tall.shape[1], columns), jnp.float32)
    basis = jnp.linalg.qr(sketch)[0]
    for _ in range(POWER_ITERATIONS):
        images = jnp.matmul(tall, basis, precision=HIGHEST)
        # Without this step the images of small directions drown in those of the large ones.
        images = jnp.linalg.qr(images)[0]
        basis = jnp.linalg.qr(jnp.matmul(tall.T, images, precision=HIGHEST))[0]
    turn, values = _gram_directions(jnp.matmul(tall, basis, precision=HIGHEST))
    return jnp.matmul(basis, turn, precision=HIGHEST), values


@functools.partial(jax.jit, static_argnames=("wide",))
def _images(
    matrix: Float[Array, "m n"], right: Float[Array, "q r"], *, wide: bool
) -> tuple[Float[Array, "p r"], Float[Array, ""]]:
    """The factor that carries the singular values, and the relative error of the product."""
    tall = matrix.T if wide else matrix
    left = jnp.matmul(tall, right, precision=HIGHEST)
    rest = tall - jnp.matmul(left, right.T, precision=HIGHEST)
    # In float64, so that squares of tiny and of huge entries stay in range.
    norm = jnp.linalg.norm(tall.astype(jnp.float64))
    error = jnp.linalg.norm(rest.astype(jnp.float64)) / jnp.where(norm > 0, norm, 1.0)
    return left, error.astype(jnp.float32)


def _over_layers(
    function: Callable[..., Any], stacks: tuple[jax.Array, ...], mesh: Mesh | None, **static: Any
) -> Any:
    """``function`` of every matrix of the stacks, results stacked on the layer axis.

    A matrix at a time for each worker, so that temporaries stay a few matrices.
    """
    if mesh is not None:
        # Axes that the compiler may reshard over, whichever kind the caller's mesh has.
        mesh = Mesh(mesh.devices, mesh.axis_names)
        with jax.enable_x64(True):
            return _over_devices(function, stacks, mesh, tuple(static.items()))
    device = _default_device()

    def one(layer: int) -> Any:
        # JAX's settings belong to a thread.
        with jax.default_device(device), jax.enable_x64(True):
            matrices = [stack[layer] for stack in stacks]
            return jax.block_until_ready(function(*matrices, **static))

    on_cpu = all(d.platform == "cpu" for d in stacks[0].devices())
    workers = len(os.sched_getaffinity(0)) if on_cpu else 1
    with _one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(one, range(stacks[0].shape[0])))
    return jax.tree.map(lambda *parts: jnp.stack(parts), *results)


@functools.partial(jax.jit, static_argnames=("function", "mesh", "static"))
def _over_devices(
    function: Callable[..., Any],
    stacks: tuple[jax.Array, ...],
    mesh: Mesh,
    static: tuple[tuple[str, Any], ...],
) -> Any:
    layers = stacks[0].shape[0]
    missing = -layers % mesh.size
    padded = tuple(jnp.pad(stack, [(0, missing)] + [(0, 0)] * (stack.ndim - 1)) for stack in stacks)
    split = PartitionSpec(mesh.axis_names)

    def one(matrices: tuple[jax.Array, ...]) -> Any:
        return function(*matrices, **dict(static))

    mapped = jax.shard_map(
        lambda *parts: jax.lax.map(one, parts),
        mesh=mesh,
        in_specs=split,
        out_specs=split,
        check_vma=False,  # eigh has no replication rule
    )
    return jax.tree.map(lambda out: out[:layers], mapped(*padded))


def _default_device() -> Any:
    """What ``jax.default_device`` is set to in this thread, or None."""
    config: Any = jax.config
    return config.jax_default_device


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """One thread a LAPACK call: the calls run side by side, and threads inside them only wait.

    On a busy machine many small eigenproblems were up to a hundred times slower without this.
    """
    # JAX takes LAPACK from here on first use; a library that is not loaded cannot be limited.
    importlib.import_module("scipy.linalg.cython_lapack")

    with threadpool_limits(1, user_api="blas"):
        yield
