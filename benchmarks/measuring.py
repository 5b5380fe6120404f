"""What the benchmark scripts share: timing in turns, limits of this machine, rows as JSON."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

Row = dict[str, Any]


def row(
    title: str,
    ours: float,
    peer: float,
    peer_name: str,
    unit: str,
    limit: float | None = None,
    *,
    more_is_better: bool = False,
    **more: Any,
) -> Row:
    """One measured row; a ratio above 1 means that ours is better."""
    better, worse = (ours, peer) if more_is_better else (peer, ours)
    return {
        "row": title,
        "ours": _rounded(ours),
        "peer": _rounded(peer),
        "peer_name": peer_name,
        "unit": unit,
        "ratio": round(better / worse, 3) if worse else None,
        "limit": None if limit is None else _rounded(limit),
        **more,
    }


def write_rows(path: Path | None, rows: Sequence[Row]) -> None:
    """Write rows as JSON where a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def best_of(times: int, run: Callable[[], Any]) -> float:
    """Seconds of the fastest of some runs, after one that is not counted."""
    run()
    return min(timed(run) for _ in range(times))


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, one of each after the other, so that a busy moment hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    return seconds


def matmul_rate(side: int = 3072) -> float:
    """Operations a second of a large float32 product."""
    square = jnp.ones((side, side), jnp.float32)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    return 2.0 * side**3 / best_of(5, lambda: jax.block_until_ready(product(square)))


def read_bandwidth() -> float:
    """Bytes a second of a sum over 256 MB."""
    x = jnp.ones(64 << 20, jnp.float32)
    total = jax.jit(jnp.sum)
    return x.nbytes / best_of(5, lambda: jax.block_until_ready(total(x)))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of an addition over 512 MB into memory that is there."""
    big = jnp.ones(2**27, jnp.float32)
    shift = jax.jit(lambda old, a: a + 1.0, donate_argnums=0, keep_unused=True)
    old = [jnp.zeros_like(big)]

    def copy() -> None:
        old[0] = jax.block_until_ready(shift(old[0], big))

    return 2.0 * big.nbytes / best_of(5, copy)


def _rounded(value: float) -> float:
    """Four significant digits or more."""
    return float(f"{value:.4g}") if abs(value) < 1000 else round(value, 1)
