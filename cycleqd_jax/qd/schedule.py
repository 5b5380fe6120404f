"""Schedules: which archive a child is bred for.

A schedule is a function ``(generation, batch_size, num_archives) -> (batch_size,) int32`` of the
generation counter (may be traced); the two sizes are static.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array, int, int], jax.Array]


def cycle_per_generation(generation: jax.Array, batch_size: int, num_archives: int) -> jax.Array:
    """Archive ``t mod K`` for all children of generation t (the paper's)."""
    return jnp.full(batch_size, generation % num_archives, jnp.int32)


def cycle_per_child(generation: jax.Array, batch_size: int, num_archives: int) -> jax.Array:
    """The next archive for each child, counted over the whole run (the authors' code)."""
    return _every(1, generation, batch_size, num_archives)


def cycle_every(n: int) -> Schedule:
    """The next archive after every n children, counted over the whole run.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"expected the archive to change after at least 1 child, found {n}")
    return _CycleEvery(n)


@dataclasses.dataclass(frozen=True)
class _CycleEvery:
    n: int

    def __call__(self, generation: jax.Array, batch_size: int, num_archives: int) -> jax.Array:
        return _every(self.n, generation, batch_size, num_archives)


def _every(n: int, generation: jax.Array, batch_size: int, num_archives: int) -> jax.Array:
    # The pattern repeats after n * K children: reducing first keeps the count inside int32 in any
    # run.
    period = n * num_archives
    start = (generation % period) * (batch_size % period) % period
    child = jnp.asarray(start, jnp.int32) + jnp.arange(batch_size, dtype=jnp.int32)
    return (child // n) % num_archives
