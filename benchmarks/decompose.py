"""Seconds to decompose task vectors, by every method, against `torch.linalg.svd`.

    python benchmarks/decompose.py [--rounds 3] [--json FILE]

All of them get the same matrices, of Llama-like shapes: a flat spectrum (independent entries, the
hardest to truncate) and one that falls over three decades, as task vectors of fine-tuned models
do. They take turns, round after round, and the median counts. Printed besides: the relative error
of `u v^T`, its excess over the best possible one where directions are dropped, and how far the
orthonormal factor is from orthonormal, both in float64. The limit of "gram" is the time of
its matrix products alone (Gram matrix in float64, image and check in float32) at the speed that
products of this shape reach here, without the eigenproblem.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from measuring import best_of, in_turns, row, write_rows

from cycleqd_jax.merging.decomposition import METHODS, Method, factorise


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int]
    decades: float
    rank: int | None
    methods: tuple[Method, ...]


CASES = (
    Case("square, flat", (4, 1024, 1024), 0.0, None, ("gram", "svd")),
    Case("square, falling", (4, 1024, 1024), 3.0, None, ("gram", "svd")),
    Case("wide, falling", (2, 1024, 2816), 3.0, None, ("gram", "svd")),
    Case("wide, falling, rank 64", (2, 1024, 2816), 3.0, 64, METHODS),
    Case("wide, flat, rank 64", (2, 1024, 2816), 0.0, 64, METHODS),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    rows = [found for case in CASES for found in measure(case, options.rounds)]
    for found in rows:
        print(
            f"{found['row']:36s} {found['ours']:7.3f} s   "
            f"{found['peer_name']} {found['peer']:7.3f} s   "
            f"ratio {found['ratio']:5.2f}   "
            f"products alone {found['limit'] or float('nan'):6.3f} s   "
            f"error {found['error']:.1e}   excess {found['excess']:.1e}   "
            f"orthonormal to {found['orthonormal']:.1e}"
        )
    write_rows(options.json, rows)


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    tau = task_vectors(case)
    on_torch, on_jax = torch.from_numpy(tau), jnp.asarray(tau)
    floor = np.zeros(tau.shape[0], np.float32)

    def ours(method: Method) -> Any:
        return jax.block_until_ready(factorise(on_jax, floor, case.rank, method=method))

    runs: dict[str, Callable[[], Any]] = {m: partial(ours, m) for m in case.methods}
    runs["torch"] = lambda: torch.linalg.svd(on_torch, full_matrices=False)
    results = {name: run() for name, run in runs.items()}  # compiles, and warms torch's threads
    seconds = in_turns(runs, rounds)
    peer = statistics.median(seconds["torch"])
    best = best_error(tau, case.rank)
    limit = products_alone(on_jax, results["gram"][0].shape[-1])
    rows = []
    for method in case.methods:
        u, v, _ = results[method]
        error, orthonormal = quality(tau, np.asarray(u, np.float64), np.asarray(v, np.float64))
        own = statistics.median(seconds[method])
        rows.append(
            row(
                f"{method}: {case.name}",
                own,
                peer,
                "torch.linalg.svd",
                "s",
                limit if method == "gram" else None,
                error=error,
                excess=error - best,
                orthonormal=orthonormal,
            )
        )
    return rows


def task_vectors(case: Case) -> np.ndarray:
    """Matrices of one case; a falling spectrum is made by scaling the shorter side."""
    tau = np.random.default_rng(0).normal(size=case.shape)
    scales = np.geomspace(1.0, 10.0**-case.decades, case.shape[-2])
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(case.shape[-2],) * 2))[0]
    return (1e-3 * turn @ (scales[:, None] * tau)).astype(np.float32)


def quality(tau: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[float, float]:
    """Largest relative error over the layers, and largest entry of ``V^T V - I``."""
    rest = np.linalg.norm(tau - u @ np.swapaxes(v, -1, -2), axis=(-1, -2))
    short = u if u.shape[-2] <= v.shape[-2] else v
    gram = np.swapaxes(short, -1, -2) @ short
    error = rest / np.linalg.norm(tau.astype(np.float64), axis=(-1, -2))
    return float(error.max()), float(np.abs(gram - np.eye(gram.shape[-1])).max())


def best_error(tau: np.ndarray, rank: int | None) -> float:
    """Least relative error any matrices of this rank can have (Eckart and Young, 1936)."""
    if rank is None:
        return 0.0
    values = np.linalg.svd(tau.astype(np.float64), compute_uv=False)
    tail = np.sqrt(np.square(values[:, rank:]).sum(axis=-1) / np.square(values).sum(axis=-1))
    return float(tail.max())


@jax.jit
def _gram(tau: Any) -> Any:
    tau = tau.astype(jnp.float64)
    return tau @ jnp.swapaxes(tau, -1, -2)


@jax.jit
def _image_and_check(tau: Any, v: Any) -> Any:
    return (jnp.swapaxes(v, -1, -2) @ tau), v @ (jnp.swapaxes(v, -1, -2) @ tau)


def products_alone(tau: Any, rank: int) -> float:
    def products() -> None:
        with jax.enable_x64(True):
            jax.block_until_ready(_gram(tau))
        jax.block_until_ready(_image_and_check(tau, v))

    v = jnp.ones((*tau.shape[:-1], rank), jnp.float32)
    return best_of(3, products)


if __name__ == "__main__":
    main()
