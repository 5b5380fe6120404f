"""A pool without its free slots, for storing; every elite finds back into its own slot.

Free slots are most of a pool that was allocated for the worst case. Slots are kept, not only
elites, since ties are broken by their order: a search goes on from an expanded repertoire exactly
as from the one that was compacted.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cycleqd_jax.qd.insertion import EMPTY
from cycleqd_jax.qd.pool import PooledRepertoire


class Compact(struct.PyTreeNode):
    """A repertoire of N elites.

    Attributes:
        repertoire: the repertoire with a pool of N slots, valid as it is.
        slots: (N,) int32, ascending, the slot each elite had.
        capacity: int32 scalar, slots the pool had.
    """

    repertoire: Any
    slots: Any
    capacity: Any


def compact(repertoire: PooledRepertoire) -> Compact:
    """The repertoire without its free slots; not for compiled code."""
    slots = np.flatnonzero(np.asarray(repertoire.occupied)).astype(np.int32)
    number = np.full(repertoire.capacity + 1, EMPTY, np.int32)
    number[slots] = np.arange(len(slots), dtype=np.int32)
    # Empty cells hold -1, which is the last number: EMPTY again.
    small = repertoire.replace(
        **{name: jax.tree.map(lambda x: x[slots], pool) for name, pool in _pools(repertoire)},
        cells=jnp.asarray(number[np.asarray(repertoire.cells)]),
    )
    return Compact(small, jnp.asarray(slots), jnp.int32(repertoire.capacity))


def expand(compacted: Compact) -> Any:
    """The inverse of `compact`; free slots are zero, their scores -inf, as in a new pool."""
    small, slots = compacted.repertoire, np.asarray(compacted.slots)
    capacity = int(compacted.capacity)

    def spread(pool: jax.Array, fill: float = 0) -> jax.Array:
        return jnp.full((capacity, *pool.shape[1:]), fill, pool.dtype).at[slots].set(pool)

    cells = np.asarray(small.cells)
    pools = {name: jax.tree.map(spread, pool) for name, pool in _pools(small)}
    return small.replace(
        **{**pools, "scores": spread(small.scores, -jnp.inf)},
        cells=jnp.asarray(np.where(cells == EMPTY, EMPTY, slots[cells])),
    )


def _pools(repertoire: PooledRepertoire) -> list[tuple[str, Any]]:
    return [(name, getattr(repertoire, name)) for name in ("genotypes", "scores", "extra_scores")]
