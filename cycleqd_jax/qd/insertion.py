"""The insertion rule of the cyclic archives, as pure functions of score tables.

1. A row with any score that is not finite never enters and never blocks a rival.
2. In every archive the best row of the batch competes for its cell; on a tie the first row.
3. It enters if the cell is empty or its quality is strictly better than the incumbent's. Rows can
be kept out of single archives beforehand; they block no rival there either.
4. A row that enters at least one archive takes one slot of the pool; slots no cell points at are
free.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from cycleqd_jax.qd.tessellation import Tessellation

EMPTY = -1


def is_traced(x: Any) -> bool:
    """Whether a value is not known yet, inside a compiled function."""
    return isinstance(x, jax.core.Tracer)


class Decision(struct.PyTreeNode):
    """Which rows of a batch enter which cells.

    Attributes:
        entrant: (K, C) int32 row of the batch that takes the cell, or -1.
        accepted: (B,) bool, the row enters at least one archive.
        used: (P,) bool, the slot is still pointed at by a cell that keeps its elite.
        slots_needed: int32 scalar, size of a pool that holds those that stay and those that enter.
    """

    entrant: Any
    accepted: Any
    used: Any
    slots_needed: Any


def occupied_slots(cells: Int[Array, "*shape"], capacity: int) -> Bool[Array, " capacity"]:
    """Mask of the pool's slots that some cell points at."""
    # Index -1 would wrap around to the last slot: empty cells point one past the end and are
    # dropped.
    target = jnp.where(cells == EMPTY, capacity, cells).ravel()
    return jnp.zeros(capacity, bool).at[target].set(True, mode="drop")


def _challengers(
    tessellation: Tessellation,
    batch_scores: Float[Array, "batch tasks"],
    valid: Bool[Array, " batch"],
    k: Int[Array, ""],
) -> tuple[Int[Array, " cells"], Float[Array, " cells"]]:
    rows = jnp.arange(batch_scores.shape[0], dtype=jnp.int32)
    cells = tessellation.num_cells
    quality = jnp.where(valid, jnp.take(batch_scores, k, axis=1), -jnp.inf)
    cell = tessellation.cell_of(batch_scores, k)
    best = jax.ops.segment_max(quality, cell, num_segments=cells)
    winner = valid & (quality == best[cell])
    last = rows.shape[0]
    first = jax.ops.segment_min(jnp.where(winner, rows, last), cell, num_segments=cells)
    # A cell without rows gets the identity of min, a cell without valid rows gets `last`.
    return jnp.where(first < last, first, EMPTY), best


def incumbent_quality(
    scores: Float[Array, "capacity tasks"], cells: Int[Array, "tasks cells"]
) -> Float[Array, "tasks cells"]:
    """Quality of every archive's elites, -inf in empty cells."""
    tasks = jnp.arange(cells.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(cells == EMPTY, -jnp.inf, scores.T[tasks, jnp.maximum(cells, 0)])


@jax.jit
def decide(
    tessellation: Tessellation,
    scores: Float[Array, "capacity tasks"],
    cells: Int[Array, "tasks cells"],
    batch_scores: Float[Array, "batch tasks"],
    eligible: Bool[Array, "tasks batch"] | None = None,
) -> Decision:
    """Apply rules 1 to 3 in all archives.

    Args:
        tessellation: the cells.
        scores: scores of the pool.
        cells: pool index of each archive's cells, -1 = empty.
        batch_scores: scores of the rows that are offered.
        eligible: which rows may enter which archive; None: every row every archive.
    """
    tasks = jnp.arange(tessellation.num_tasks, dtype=jnp.int32)
    valid = jnp.isfinite(batch_scores).all(axis=1)
    allowed = jnp.broadcast_to(valid, (tessellation.num_tasks, batch_scores.shape[0]))
    allowed = allowed if eligible is None else allowed & eligible
    challenger, best = jax.vmap(_challengers, in_axes=(None, None, 0, 0))(
        tessellation, batch_scores, allowed, tasks
    )
    better = best > incumbent_quality(scores, cells)
    entrant = jnp.where(better, challenger, EMPTY)
    return decision_of(entrant, cells, scores.shape[0], batch_scores.shape[0])


def decision_of(
    entrant: Int[Array, "tasks cells"], cells: Int[Array, "tasks cells"], capacity: int, batch: int
) -> Decision:
    """What follows for the pool when row ``entrant[k, c]`` of a batch takes cell c of archive k."""
    accepted = occupied_slots(entrant, batch)
    used = occupied_slots(jnp.where(entrant == EMPTY, cells, EMPTY), capacity)
    needed = jnp.sum(used, dtype=jnp.int32) + jnp.sum(accepted, dtype=jnp.int32)
    return Decision(entrant=entrant, accepted=accepted, used=used, slots_needed=needed)


def assign_slots(
    decision: Decision, cells: Int[Array, "tasks cells"]
) -> tuple[Int[Array, " batch"], Int[Array, "tasks cells"]]:
    """Apply rule 4: a free slot for every accepted row, in order.

    Needs ``decision.slots_needed <= P``.

    Returns:
        Slot of every row (P, one past the end, for rows that do not enter) and the new table of
        cells.
    """
    capacity = decision.used.shape[0]
    batch = decision.accepted.shape[0]
    free = jnp.nonzero(~decision.used, size=min(batch, capacity), fill_value=capacity)[0]
    place = jnp.cumsum(decision.accepted, dtype=jnp.int32) - 1
    slot = jnp.where(decision.accepted, free[jnp.clip(place, 0, free.shape[0] - 1)], capacity)
    slot = slot.astype(jnp.int32)
    entered = decision.entrant != EMPTY
    return slot, jnp.where(entered, slot[jnp.maximum(decision.entrant, 0)], cells)
