"""Dominated Novelty Search: archives without cells, for any number of tasks.

Bahlous-Boldi et al., "Dominated Novelty Search: Rethinking Local Competition in
Quality-Diversity", arXiv 2502.00593. An archive keeps a fixed number N of elites: those that are
far, in behaviour, from the models that beat them. No range and no number of bins has to be chosen.
In every archive k, after each batch:

1. A row with any score that is not finite never enters and never beats another.
2. The candidates are the archive's elites, in cell order, then the rows of the batch, in order. A
   candidate *beats* another if its score on task k is higher, or equal and it comes first. (The
   paper counts higher scores only, so that equal copies would all count as unbeaten; the authors'
   code counts equal ones too, so that two equal best models drive each other out.)
3. A candidate's dominated novelty is the mean Euclidean distance, in the scores of the other tasks
   over ``scale``, to the ``neighbours`` nearest candidates that beat it, to all of them if they
   are fewer. The one that nobody beats has infinite novelty.
4. The N candidates of highest novelty stay; on a tie the one that beats the other.
5. An elite that stays keeps its cell. Rows that enter take, in order, the cells that are empty or
   whose elite leaves.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from cycleqd_jax.qd.insertion import EMPTY, Decision, decision_of
from cycleqd_jax.qd.pool import PooledRepertoire
from cycleqd_jax.qd.tessellation import other_tasks


class DominatedNovelty(struct.PyTreeNode):
    """The competition. Make one with `make_dominated_novelty`.

    Attributes:
        scale: (K,) float32, the difference in score on a task that counts as a distance of one.
        num_cells: elites of one archive N, static.
        neighbours: how many of the nearest better models are looked at, static.
    """

    scale: Any
    num_cells: int = struct.field(pytree_node=False)
    neighbours: int = struct.field(pytree_node=False)

    @property
    def num_tasks(self) -> int:
        """Number of tasks K."""
        return int(self.scale.shape[0])


def make_dominated_novelty(
    num_tasks: int, num_cells: int, neighbours: int = 3, scale: Any = 1.0
) -> DominatedNovelty:
    """Competition for K archives of ``num_cells`` elites.

    Args:
        num_tasks: K, at least 2.
        num_cells: elites of one archive, at least 1.
        neighbours: how many of the nearest better models count, at least 1; 3 in the paper.
        scale: a number or (K,) positive numbers; give the width of every task's range where the
            tasks are scored in different units.

    Raises:
        ValueError: a number that is too small, or a scale that is not (K,), finite and positive.
    """
    if num_tasks < 2:
        raise ValueError(
            "expected at least 2 tasks (with one task no behaviour tells models apart), "
            f"found {num_tasks}"
        )
    for name, value in (("num_cells", num_cells), ("neighbours", neighbours)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")
    units = np.asarray(scale, np.float32)
    if units.shape not in ((), (num_tasks,)):
        raise ValueError(
            f"scale: expected one number or {num_tasks}, one a task, found shape {units.shape}"
        )
    if not (np.isfinite(units).all() and (units > 0).all()):
        raise ValueError(f"scale must be finite and positive, found {units.tolist()}")
    return DominatedNovelty(
        scale=jnp.asarray(np.broadcast_to(units, (num_tasks,))),
        num_cells=int(num_cells),
        neighbours=int(neighbours),
    )


class DominatedNoveltyRepertoire(PooledRepertoire):
    """K archives of N elites each that survive by dominated novelty.

    Same interface as ``CyclicRepertoire``; a "cell" is a place for one elite, with no region of
    its own. An archive's best model always stays.

    Attributes:
        competition: the rule's numbers.
    """

    competition: Any

    @classmethod
    def rule_fields(cls, rule: Any) -> dict[str, Any]:
        """The `DominatedNovelty`."""
        if not isinstance(rule, DominatedNovelty):
            raise ValueError(
                "centroids: expected a DominatedNovelty (see make_dominated_novelty), found "
                f"{type(rule).__name__}"
            )
        return {"competition": rule}

    def decide(self, batch_scores: Float[Array, "batch tasks"]) -> Decision:
        """Which rows of a batch would enter which cells; changes nothing."""
        return compete(self.competition, self.scores, self.cells, batch_scores)


def dominated_novelty(
    behaviour: Float[Array, "candidates others"], neighbours: int
) -> Float[Array, " candidates"]:
    """Rule 3 for candidates in falling order: each is beaten by those before it.

    Args:
        behaviour: scores on the other tasks, in units of distance.
        neighbours: how many of the nearest better candidates count.
    """
    count = behaviour.shape[0]
    squares = jnp.zeros((count, count), jnp.float32)
    for i in range(behaviour.shape[1]):
        step = behaviour[:, i, None] - behaviour[None, :, i]
        squares = squares + step * step
    rank = jnp.arange(count, dtype=jnp.int32)
    beats = rank[None, :] < rank[:, None]
    nearest, _ = jax.lax.top_k(jnp.where(beats, -squares, -jnp.inf), min(neighbours, count))
    beaten_by = jnp.minimum(rank, neighbours)
    counted = jnp.arange(nearest.shape[1], dtype=jnp.int32) < beaten_by[:, None]
    total = jnp.sum(jnp.where(counted, jnp.sqrt(-nearest), 0.0), axis=1)
    return jnp.where(rank > 0, total / jnp.maximum(beaten_by, 1), jnp.inf)


def _survivors(
    quality: Float[Array, " candidates"],
    behaviour: Float[Array, "candidates others"],
    present: Bool[Array, " candidates"],
    competition: DominatedNovelty,
) -> Bool[Array, " candidates"]:
    """Rules 2 to 4: mask of the at most N candidates that stay."""
    # Those absent come last, so they beat nobody.
    order = jnp.argsort(jnp.where(present, -quality, jnp.inf), stable=True)
    here = present[order]
    novelty = dominated_novelty(
        jnp.where(here[:, None], behaviour[order], 0.0), competition.neighbours
    )
    best = jnp.argsort(jnp.where(here, -novelty, jnp.inf), stable=True)[: competition.num_cells]
    return jnp.zeros_like(present).at[order[best]].set(here[best])


@jax.jit
def compete(
    competition: DominatedNovelty,
    scores: Float[Array, "capacity tasks"],
    cells: Int[Array, "tasks cells"],
    batch_scores: Float[Array, "batch tasks"],
) -> Decision:
    """Apply the rules in all archives.

    Takes ``O((N + B)^2 K)`` operations an archive and the memory of one ``(N + B)^2`` table.

    Args:
        competition: the rule's numbers.
        scores: scores of the pool.
        cells: pool index of each archive's elites, -1 = empty.
        batch_scores: scores of the rows that are offered.
    """
    tasks = competition.num_tasks
    valid = jnp.isfinite(batch_scores).all(axis=1)

    def entrants(archive: tuple[jax.Array, jax.Array]) -> jax.Array:
        k, indices = archive
        candidates = jnp.concatenate([scores[jnp.maximum(indices, 0)], batch_scores])
        others = other_tasks(tasks, k)
        survives = _survivors(
            candidates[:, k],
            jnp.take(candidates, others, axis=1) / competition.scale[others],
            jnp.concatenate([indices != EMPTY, valid]),
            competition,
        )
        stays, enters = jnp.split(survives, [indices.shape[0]])
        return _seat(stays, enters)

    # One archive after the other: a table of all pairs is large enough to fill the machine.
    entrant = jax.lax.map(entrants, (jnp.arange(tasks, dtype=jnp.int32), cells))
    return decision_of(entrant, cells, scores.shape[0], batch_scores.shape[0])


def _seat(stays: Bool[Array, " cells"], enters: Bool[Array, " batch"]) -> Int[Array, " cells"]:
    """Rule 5: row of the batch that takes each cell, or -1."""
    count = stays.shape[0]
    vacant = jnp.nonzero(~stays, size=count, fill_value=count)[0]
    place = jnp.cumsum(enters, dtype=jnp.int32) - 1
    seat = jnp.where(enters, vacant[jnp.clip(place, 0, count - 1)], count)
    rows = jnp.arange(enters.shape[0], dtype=jnp.int32)
    return jnp.full(count, EMPTY, jnp.int32).at[seat].set(rows, mode="drop")
