"""K archives over one pool of genotypes: the repertoire of CycleQD."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from qdax.core.containers.mapelites_repertoire import MapElitesRepertoire
from qdax.core.containers.repertoire import Repertoire
from qdax.core.emitters.repertoire_selectors.selector import Selector
from qdax.core.emitters.repertoire_selectors.uniform_selector import UniformSelector

from cycleqd_jax.merging.task_vector import check_same_tree, leaf_paths
from cycleqd_jax.qd.grid import Grid, centroids, other_tasks
from cycleqd_jax.qd.insertion import EMPTY, Decision, assign_slots, decide, occupied_slots

FULL_POOL_BYTES = 2**28
"""A pool up to this size is allocated at once for the worst case; a bigger one starts small."""


class CyclicRepertoire(Repertoire):
    """One MAP-Elites archive a task, all pointing into one pool, so a genotype is stored once.

    A QDax ``Repertoire``: it works inside ``MAPElites`` (``init_ask_tell``/``ask``/``tell``, and
    ``scan_update`` under jit when the capacity suffices). Scores are given both as fitnesses and
    as descriptors. The insertion rules are those of `cycleqd_jax.qd.insertion`.

    Attributes:
        genotypes: pool, every leaf (P, ...); slots that no cell points at hold leftovers.
        scores: (P, K) float32, higher is better; -inf in free slots.
        extra_scores: name -> tree with leaves (P, ...), the extra scores that are kept.
        cells: (K, C) int32, pool index of each archive's elites, -1 = empty.
        grid: the cells' bins.
        keys_extra_scores: names of the extra scores that are kept, static.
        in_place: an eager `add` writes into this repertoire's own memory, and the repertoire it
            was called on can no longer be used. For pools that fit into memory only once;
            compiled code needs no such leave. Static.
    """

    genotypes: Any
    scores: Any
    extra_scores: Any
    cells: Any
    grid: Any
    keys_extra_scores: tuple[str, ...] = flax.struct.field(pytree_node=False)
    in_place: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def init(
        cls,
        genotypes: Any,
        fitnesses: Any,
        descriptors: Any,
        centroids: Any,
        extra_scores: Mapping[str, Any] | None = None,
        *,
        capacity: int | None = None,
        keys_extra_scores: tuple[str, ...] = (),
        in_place: bool = False,
    ) -> "CyclicRepertoire":
        """Make a repertoire from evaluated genotypes.

        Args:
            genotypes: tree with leaves (B, ...), B >= 1.
            fitnesses: (B, K) scores.
            descriptors: (B, K), the same scores again (QDax passes both).
            centroids: the `Grid`; the name is QDax's.
            extra_scores: name -> tree with leaves (B, ...).
            capacity: slots of the pool. None: the worst case of one elite a cell if that takes at
                most ``FULL_POOL_BYTES``, else what the batch needs; an eager `add` grows it.
            keys_extra_scores: which extra scores to keep.
            in_place: let an eager `add` consume the repertoire it is called on, see the class.

        Raises:
            ValueError: not a grid, no genotype, wrong number of scores, no row with finite
                scores, an extra score that is missing, or (under jit) too small a capacity.
        """
        if not isinstance(centroids, Grid):
            raise ValueError(
                f"centroids: expected a Grid (see make_grid), found {type(centroids).__name__}"
            )
        grid, batch = centroids, _batch_size(genotypes)
        if batch == 0:
            raise ValueError("expected at least one evaluated genotype, found an empty batch")
        scores = _check_scores(fitnesses, descriptors, batch, grid)
        if not _traced(scores) and not np.isfinite(np.asarray(scores)).all(axis=1).any():
            raise ValueError(
                f"expected at least one genotype with {grid.num_tasks} finite scores, found none "
                f"among {batch}: the archives would be empty"
            )
        kept = _filter(extra_scores, tuple(keys_extra_scores))
        slots = _default_capacity(genotypes, grid, batch) if capacity is None else capacity
        if slots < 1:
            raise ValueError(f"capacity must be at least 1, found {slots}")
        empty = cls(
            genotypes=_zeros(genotypes, slots),
            scores=jnp.full((slots, grid.num_tasks), -jnp.inf, jnp.float32),
            extra_scores=_zeros(kept, slots),
            cells=jnp.full((grid.num_tasks, grid.num_cells), EMPTY, jnp.int32),
            grid=grid,
            keys_extra_scores=tuple(keys_extra_scores),
            in_place=True,
        )
        added = empty.add(genotypes, descriptors, fitnesses, extra_scores)
        return added.replace(in_place=in_place)

    def add(
        self,
        genotypes: Any,
        descriptors: Any,
        fitnesses: Any,
        extra_scores: Mapping[str, Any] | None = None,
    ) -> "CyclicRepertoire":
        """Offer a batch to all archives; QDax's order of arguments.

        Eagerly the pool doubles until everything fits, so an elite is never dropped. Compiled
        code cannot grow it: there the capacity must cover the worst case. Eagerly the pool is
        copied, unless the repertoire is ``in_place``.

        Args:
            genotypes: tree with leaves (B, ...), shapes and dtypes of the pool.
            descriptors: (B, K) scores.
            fitnesses: (B, K) the same scores.
            extra_scores: name -> tree with leaves (B, ...).

        Raises:
            ValueError: wrong number of scores, a tree or dtype that differs from the pool's (the
                leaf is named), an extra score that is missing, or under jit a capacity below ``K
                * num_cells``.
        """
        batch = _batch_size(genotypes)
        scores = _check_scores(fitnesses, descriptors, batch, self.grid)
        _check_genotypes(self.genotypes, genotypes, batch)
        kept = _filter(extra_scores, self.keys_extra_scores)
        check_same_tree(_one(self.extra_scores), _one(kept), "the pool's extra scores", "the batch")
        if batch == 0:
            return self
        decision = decide(self.grid, self.scores, self.cells, scores)
        capacity = self._capacity_for(decision)
        write = _write_in_place if self.in_place and capacity == self.capacity else _write
        # Several repertoires may share the grid: it must not be given away with the pool.
        pool = self.replace(grid=None)
        return write(pool, decision, genotypes, scores, kept, capacity).replace(grid=self.grid)

    def _capacity_for(self, decision: Decision) -> int:
        worst = self.cells.size
        if self.capacity >= worst:
            return self.capacity
        if _traced(decision.slots_needed):
            raise ValueError(
                f"a pool of capacity {self.capacity} cannot grow inside compiled code: expected at "
                f"least {worst} ({self.num_archives} archives of {self.grid.num_cells} cells). "
                f"Pass capacity={worst} to CyclicRepertoire.init, or call add outside jit"
            )
        needed, capacity = int(decision.slots_needed), self.capacity
        while capacity < needed:
            capacity = min(2 * capacity, worst)
        return capacity

    @property
    def capacity(self) -> int:
        """Slots of the pool, P."""
        return int(self.scores.shape[0])

    @property
    def num_archives(self) -> int:
        """Number of archives K, one a task."""
        return int(self.cells.shape[0])

    @property
    def occupied(self) -> Bool[Array, " capacity"]:
        """Mask of the pool's slots that hold an elite."""
        return occupied_slots(self.cells, self.capacity)

    @property
    def num_elites(self) -> Int[Array, ""]:
        """Number of distinct elites."""
        return jnp.sum(self.occupied, dtype=jnp.int32)

    def gather(self, indices: Int[Array, "*shape"]) -> Any:
        """Genotypes at pool indices, leaves (*shape, ...)."""
        return jax.tree.map(lambda x: x[indices], self.genotypes)

    def index_archive(self, k: int | Int[Array, ""]) -> MapElitesRepertoire:
        """Archive k as a QDax repertoire whose genotypes are pool indices (C,).

        Cheap, as nothing of the pool but scores is read; ``k`` may be traced. Fitnesses (C, 1)
        are -inf in empty cells, descriptors (C, K-1) the elites' scores on the other tasks, 0 in
        empty cells.
        """
        return _index_view(self.grid, self.scores, self.cells, jnp.asarray(k, jnp.int32))

    def archive(self, k: int | Int[Array, ""]) -> MapElitesRepertoire:
        """Archive k as a QDax ``MapElitesRepertoire``: genotypes (C, ...), 0 in empty cells.

        For QDax's metrics, plots and selectors. It copies an elite a cell; `index_archive` does
        not.
        """
        return _full_view(self, jnp.asarray(k, jnp.int32))

    def select(
        self, key: jax.Array, num_samples: int, selector: Selector | None = None
    ) -> MapElitesRepertoire:
        """Select from one archive, drawn uniformly, as QDax's own emitters ask for it.

        Args:
            key: random key.
            num_samples: how many to select.
            selector: a QDax selector; default ``UniformSelector`` with replacement.

        Returns:
            A ``MapElitesRepertoire`` of the selected, genotypes (num_samples, ...).
        """
        archive_key, selector_key = jax.random.split(key)
        k = jax.random.randint(archive_key, (), 0, self.num_archives, jnp.int32)
        chosen = (selector or UniformSelector()).select(
            self.index_archive(k), selector_key, num_samples
        )
        return chosen.replace(genotypes=self.gather(chosen.genotypes))


@jax.jit
def _index_view(
    grid: Grid,
    scores: Float[Array, "capacity tasks"],
    cells: Int[Array, "tasks cells"],
    k: Int[Array, ""],
) -> MapElitesRepertoire:
    indices = cells[k]
    occupied = (indices != EMPTY)[:, None]
    elites = scores[jnp.maximum(indices, 0)]
    quality = jnp.take(elites, k[None], axis=1)
    behaviour = jnp.take(elites, other_tasks(grid.num_tasks, k), axis=1)
    return MapElitesRepertoire(
        genotypes=indices,
        fitnesses=jnp.where(occupied, quality, -jnp.inf),
        descriptors=jnp.where(occupied, behaviour, 0.0),
        centroids=centroids(grid, k),
        extra_scores={},
        keys_extra_scores=(),
    )


@jax.jit
def _full_view(repertoire: CyclicRepertoire, k: Int[Array, ""]) -> MapElitesRepertoire:
    view = repertoire.index_archive(k)
    occupied = view.genotypes != EMPTY
    source = jnp.maximum(view.genotypes, 0)

    def take(x: jax.Array) -> jax.Array:
        mask = occupied.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(mask, x[source], jnp.zeros((), x.dtype))

    return view.replace(
        genotypes=jax.tree.map(take, repertoire.genotypes),
        extra_scores=jax.tree.map(take, repertoire.extra_scores),
        keys_extra_scores=repertoire.keys_extra_scores,
    )


def _written(  # operands of one kernel
    pool: CyclicRepertoire,
    decision: Decision,
    genotypes: Any,
    scores: Float[Array, "batch tasks"],
    extra_scores: Any,
    capacity: int,
) -> CyclicRepertoire:
    more = capacity - pool.capacity
    used = jnp.pad(decision.used, (0, more))
    slot, cells = assign_slots(decision.replace(used=used), pool.cells)

    def put(old: jax.Array, new: jax.Array, fill: float = 0) -> jax.Array:
        grown = jnp.pad(old, [(0, more)] + [(0, 0)] * (old.ndim - 1), constant_values=fill)
        return grown.at[slot].set(new, mode="drop")

    staying = jnp.where(decision.used[:, None], pool.scores, -jnp.inf)
    return pool.replace(
        genotypes=jax.tree.map(put, pool.genotypes, genotypes),
        scores=put(staying, scores, -jnp.inf),
        extra_scores=jax.tree.map(put, pool.extra_scores, extra_scores),
        cells=cells,
    )


_write = jax.jit(_written, static_argnames="capacity")
_write_in_place = jax.jit(_written, static_argnames="capacity", donate_argnames="pool")


def _traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def _one(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), tree)


def _zeros(tree: Any, slots: int) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((slots, *jnp.shape(x)[1:]), jnp.result_type(x)), tree)


def _batch_size(genotypes: Any) -> int:
    leaves = jax.tree.leaves(genotypes)
    if not leaves or jnp.ndim(leaves[0]) == 0:
        raise ValueError("expected genotypes with a leading batch axis, found none")
    return int(jnp.shape(leaves[0])[0])


def _default_capacity(genotypes: Any, grid: Grid, batch: int) -> int:
    worst = grid.num_tasks * grid.num_cells
    bytes_each = sum(
        int(np.prod(jnp.shape(x)[1:])) * jnp.result_type(x).itemsize
        for x in jax.tree.leaves(genotypes)
    )
    return worst if worst * bytes_each <= FULL_POOL_BYTES else min(worst, max(batch, 64))


def _check_scores(fitnesses: Any, descriptors: Any, batch: int, grid: Grid) -> jax.Array:
    for name, array in (("fitnesses", fitnesses), ("descriptors", descriptors)):
        if tuple(jnp.shape(array)) != (batch, grid.num_tasks):
            raise ValueError(
                f"{name}: expected scores of shape {(batch, grid.num_tasks)}, one row a genotype "
                f"and one column a task, found {tuple(jnp.shape(array))}"
            )
    return jnp.asarray(fitnesses, jnp.float32)


def _check_genotypes(pool: Any, genotypes: Any, batch: int) -> None:
    check_same_tree(_one(pool), _one(genotypes), "the pool", "the batch of genotypes")
    for path, old, new in zip(
        leaf_paths(pool), jax.tree.leaves(pool), jax.tree.leaves(genotypes), strict=True
    ):
        if jnp.shape(new)[0] != batch:
            raise ValueError(
                f"genotype leaf '{path}': expected {batch} rows, found {jnp.shape(new)[0]}"
            )
        if jnp.result_type(new) != old.dtype:
            raise ValueError(
                f"genotype leaf '{path}': expected dtype {old.dtype} as in the pool, "
                f"found {jnp.result_type(new)}"
            )


def _filter(extra_scores: Mapping[str, Any] | None, keys: tuple[str, ...]) -> dict[str, Any]:
    given = extra_scores or {}
    for name in keys:
        if name not in given:
            raise ValueError(
                f"expected an extra score '{name}' (keys_extra_scores), found {sorted(given)}"
            )
    return {name: given[name] for name in keys}
