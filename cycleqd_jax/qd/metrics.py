"""How full and how good the archives are, and which children they took.

The volume of scores that the elites dominate together is in `cycleqd_jax.qd.hypervolume`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from cycleqd_jax.qd.insertion import EMPTY, incumbent_quality, occupied_slots
from cycleqd_jax.qd.pool import PooledRepertoire


def qd_metrics(repertoire: PooledRepertoire, qd_offset: float = 0.0) -> dict[str, jax.Array]:
    """Metrics of all archives; fits ``MAPElites(metrics_function=...)``.

    Args:
        repertoire: the repertoire.
        qd_offset: added to every elite's quality, so that a task with negative scores still has a
            QD score that grows with every elite.

    Under ``DominatedNoveltyRepertoire`` coverage is the share of its N places that are taken.

    Returns:
        ``coverage`` (K,) share of occupied cells in [0, 1] (QDax gives percent), ``qd_score``
        (K,) sum of the elites' qualities plus offset, ``best`` (K,) best quality, -inf in an
        empty archive, and ``num_elites``, the number of distinct elites.
    """
    # Only the tables go in: the pool's size and shape must not matter to the compiled function.
    return _metrics(repertoire.scores, repertoire.cells, jnp.asarray(qd_offset, jnp.float32))


@jax.jit
def _metrics(
    scores: Float[Array, "capacity tasks"],
    cells: Int[Array, "tasks cells"],
    qd_offset: Float[Array, ""],
) -> dict[str, jax.Array]:
    occupied = cells != EMPTY
    quality = incumbent_quality(scores, cells)
    return {
        "coverage": jnp.mean(occupied, axis=1, dtype=jnp.float32),
        "qd_score": jnp.sum(jnp.where(occupied, quality + qd_offset, 0.0), axis=1),
        "best": jnp.max(quality, axis=1),
        "num_elites": jnp.sum(occupied_slots(cells, scores.shape[0]), dtype=jnp.int32),
    }


class Acceptance(struct.PyTreeNode):
    """How many children of each of G groups entered the archives.

    Attributes:
        offered: (G,) int32, children of the group.
        accepted: (G,) int32, those that entered at least one archive.
        entries: (G, K) int32, those that entered archive k.
    """

    offered: Any
    accepted: Any
    entries: Any

    @property
    def rate(self) -> Float[Array, " groups"]:
        """Share of the group's children that entered an archive; NaN for a group without any."""
        return jnp.where(self.offered > 0, self.accepted / jnp.maximum(self.offered, 1), jnp.nan)


def acceptance(
    repertoire: PooledRepertoire,
    ids: Int[Array, " batch"],
    groups: Int[Array, " labels"],
    num_groups: int,
    name: str = "id",
) -> Acceptance:
    """Acceptance of one batch by group, read from the repertoire right after the batch was added.

    A group is whatever you compare: the archive a child was bred in (``info["archive"]`` of the
    emitter, ``num_groups`` = K), or the operator that made it, such as its emitter's number in a
    ``MultiEmitter``: ``jnp.repeat(jnp.arange(G), jnp.asarray([e.batch_size for e in emitters]))``.
    Sums over generations: ``jax.tree.map(jnp.add, a, b)``.

    Args:
        repertoire: after ``add``, with the extra score ``name`` kept.
        ids: (B,) the children's numbers, which no other child of the run bears.
        groups: (B,) group of every child; -1 for children that belong to none, as those of another
            emitter, which has no archive.
        num_groups: G.
        name: the extra score that holds the numbers, (P,) integers.

    Raises:
        ValueError: the repertoire keeps no such extra score, or ids and groups differ in length.
    """
    if name not in repertoire.extra_scores:
        raise ValueError(
            f"expected a repertoire that keeps the extra score '{name}' (keys_extra_scores), "
            f"found {sorted(repertoire.extra_scores)}"
        )
    if ids.shape != groups.shape:
        raise ValueError(
            f"expected a group for each of {ids.shape[0]} children (-1 for none), "
            f"found {groups.shape[0]}"
        )
    kept = repertoire.extra_scores[name]
    return _acceptance(kept, repertoire.cells, ids, groups, jnp.arange(num_groups))


@jax.jit
def _acceptance(
    kept: Int[Array, " capacity"],
    cells: Int[Array, "tasks cells"],
    ids: Int[Array, " batch"],
    groups: Int[Array, " batch"],
    every_group: Int[Array, " groups"],
) -> Acceptance:
    holds: Bool[Array, "tasks capacity"] = jax.vmap(occupied_slots, in_axes=(0, None))(
        cells, kept.shape[0]
    )
    # One slot at most holds a child. Slots that are free may still bear old numbers.
    found = (ids[:, None] == kept) & holds.any(axis=0)
    slot = jnp.argmax(found, axis=1)
    entered = holds[:, slot].T & found.any(axis=1)[:, None]
    member = (groups == every_group[:, None]).astype(jnp.int32)
    return Acceptance(
        offered=jnp.sum(member, axis=1, dtype=jnp.int32),
        accepted=member @ entered.any(axis=1).astype(jnp.int32),
        entries=member @ entered.astype(jnp.int32),
    )
