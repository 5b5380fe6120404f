"""K archives over one pool of genotypes: what the repertoires share.

A repertoire decides who enters which cell; the pool stores every genotype once, finds it a slot,
grows when it must and shows an archive as QDax wants to see it.
"""

import abc
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

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
from cycleqd_jax.qd.insertion import (
    EMPTY,
    Decision,
    assign_slots,
    is_traced,
    occupied_slots,
)
from cycleqd_jax.qd.tessellation import other_tasks

FULL_POOL_BYTES = 2**28
"""A pool up to this size is allocated at once for the worst case; a bigger one starts small."""

Pool = TypeVar("Pool", bound="PooledRepertoire")


class ArchiveView(MapElitesRepertoire):
    """One archive as a QDax ``MapElitesRepertoire``, for QDax's selectors, metrics and plots.

    Attributes:
        bins: bins per task where the cells are an equal grid in row-major order, None for other
            cells; static.
    """

    bins: int | None = flax.struct.field(pytree_node=False, default=None)


class PooledRepertoire(Repertoire):
    """K archives, one a task, all pointing into one pool, so that a genotype is stored once.

    A QDax ``Repertoire``: it works inside ``MAPElites`` (``init_ask_tell``/``ask``/``tell``, and
    ``scan_update`` under jit when the capacity suffices). Scores are given both as fitnesses and
    as descriptors. A subclass says in `decide` who enters which cell and makes the first pool in
    its ``init``. Whatever the rule, a row with a score that is not finite never enters, and a
    genotype that no cell points at any more frees its slot.

    Attributes:
        genotypes: pool, every leaf (P, ...); slots that no cell points at hold leftovers.
        scores: (P, K) float32, higher is better; -inf in free slots.
        extra_scores: name -> tree with leaves (P, ...), the extra scores that are kept.
        cells: (K, C) int32, pool index of each archive's elites, -1 = empty.
        keys_extra_scores: names of the extra scores that are kept, static.
        in_place: an eager `add` writes into this repertoire's own memory, and the repertoire it
            was called on can no longer be used. For pools that fit into memory only once;
            compiled code needs no such leave. Static.
    """

    genotypes: Any
    scores: Any
    extra_scores: Any
    cells: Any
    keys_extra_scores: tuple[str, ...] = flax.struct.field(pytree_node=False)
    in_place: bool = flax.struct.field(pytree_node=False)

    @abc.abstractmethod
    def decide(self, batch_scores: Float[Array, "batch tasks"]) -> Decision:
        """Which rows of a batch would enter which cells; changes nothing."""

    @classmethod
    @abc.abstractmethod
    def rule_fields(cls, rule: Any) -> dict[str, Any]:
        """Fields of the subclass that hold its rule, the ``centroids`` that `init` is given.

        Raises:
            ValueError: it is no rule of this kind of archives.
        """

    @classmethod
    def init(
        cls: type[Pool],
        genotypes: Any,
        fitnesses: Any,
        descriptors: Any,
        centroids: Any,
        extra_scores: Mapping[str, Any] | None = None,
        *,
        capacity: int | None = None,
        keys_extra_scores: tuple[str, ...] = (),
        in_place: bool = False,
    ) -> Pool:
        """Make a repertoire from evaluated genotypes.

        Args:
            genotypes: tree with leaves (B, ...), B >= 1.
            fitnesses: (B, K) scores.
            descriptors: (B, K), the same scores again (QDax passes both).
            centroids: what decides who enters which cell, see the class; the name is QDax's.
            extra_scores: name -> tree with leaves (B, ...).
            capacity: slots of the pool. None: the worst case of one elite a cell if that takes at
                most ``FULL_POOL_BYTES``, else what the batch needs; an eager `add` grows it.
            keys_extra_scores: which extra scores to keep.
            in_place: let an eager `add` consume the repertoire it is called on, see the class.

        Raises:
            ValueError: not the class's rule, no genotype, wrong number of scores, no row with
                finite scores, an extra score that is missing, or (under jit) too small a capacity.
        """
        rule = cls.rule_fields(centroids)
        shape = (centroids.num_tasks, centroids.num_cells)
        batch, (tasks, _) = _batch_size(genotypes), shape
        if batch == 0:
            raise ValueError("expected at least one evaluated genotype, found an empty batch")
        scores = _check_scores(fitnesses, descriptors, batch, tasks)
        if not is_traced(scores) and not np.isfinite(np.asarray(scores)).all(axis=1).any():
            raise ValueError(
                f"expected at least one genotype with {tasks} finite scores, found none "
                f"among {batch}: the archives would be empty"
            )
        kept = _filter(extra_scores, tuple(keys_extra_scores))
        slots = _default_capacity(genotypes, shape, batch) if capacity is None else capacity
        if slots < 1:
            raise ValueError(f"capacity must be at least 1, found {slots}")
        empty = cls(
            genotypes=_zeros(genotypes, slots),
            scores=jnp.full((slots, tasks), -jnp.inf, jnp.float32),
            extra_scores=_zeros(kept, slots),
            cells=jnp.full(shape, EMPTY, jnp.int32),
            keys_extra_scores=tuple(keys_extra_scores),
            in_place=True,
            **rule,
        )
        added = empty.add(genotypes, descriptors, fitnesses, extra_scores)
        return added.replace(in_place=in_place)

    def add(
        self: Pool,
        genotypes: Any,
        descriptors: Any,
        fitnesses: Any,
        extra_scores: Mapping[str, Any] | None = None,
    ) -> Pool:
        """Offer a batch to all archives; QDax's order of arguments.

        Eagerly the pool doubles until everything fits, so an elite is never dropped for want of
        room. Compiled code cannot grow it: there the capacity must cover the worst case. Eagerly
        the pool is copied, unless the repertoire is ``in_place``.

        Args:
            genotypes: tree with leaves (B, ...), shapes and dtypes of the pool.
            descriptors: (B, K) scores.
            fitnesses: (B, K) the same scores.
            extra_scores: name -> tree with leaves (B, ...).

        Raises:
            ValueError: wrong number of scores, a tree or dtype that differs from the pool's (the
                leaf is named), an extra score that is missing, or under jit a capacity below ``K
                * C``.
        """
        batch = _batch_size(genotypes)
        scores = _check_scores(fitnesses, descriptors, batch, self.num_archives)
        _check_genotypes(self.genotypes, genotypes, batch)
        kept = _filter(extra_scores, self.keys_extra_scores)
        check_same_tree(_one(self.extra_scores), _one(kept), "the pool's extra scores", "the batch")
        if batch == 0:
            return self
        decision = self._decide(scores, kept)
        capacity = self._capacity_for(decision)
        write = _write_in_place if self.in_place and capacity == self.capacity else _write
        # Only what the pool owns: several repertoires may share the cells' description.
        pool = (self.genotypes, self.scores, self.extra_scores, self.cells)
        pool = write(pool, decision, genotypes, scores, kept, capacity)
        names = ("genotypes", "scores", "extra_scores", "cells")
        return self.replace(**dict(zip(names, pool, strict=True)))

    def _decide(self, scores: jax.Array, extra_scores: Mapping[str, Any]) -> Decision:
        """`decide`, for a rule that looks at the extra scores that are kept too."""
        return self.decide(scores)

    def _capacity_for(self, decision: Decision) -> int:
        worst = self.cells.size
        if self.capacity >= worst:
            return self.capacity
        if is_traced(decision.slots_needed):
            raise ValueError(
                f"a pool of capacity {self.capacity} cannot grow inside compiled code: expected at "
                f"least {worst} ({self.num_archives} archives of {self.num_cells} cells). "
                f"Pass capacity={worst} to init, or call add outside jit"
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
    def num_cells(self) -> int:
        """Cells of one archive C, the most elites it holds."""
        return int(self.cells.shape[1])

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

    def index_archive(self, k: int | Int[Array, ""]) -> ArchiveView:
        """Archive k as a QDax repertoire whose genotypes are pool indices (C,).

        Cheap, as nothing of the pool but scores is read; ``k`` may be traced. Fitnesses (C, 1)
        are -inf in empty cells; descriptors (C, K-1), the elites' scores on the other tasks, and
        the extra scores that are kept are 0 there. Without a tessellation an elite is the centre
        of its own cell.
        """
        view = _index_view(self.scores, self.cells, jnp.asarray(k, jnp.int32))
        return view.replace(
            extra_scores=jax.tree.map(partial(_take_elites, view.genotypes), self.extra_scores),
            keys_extra_scores=self.keys_extra_scores,
        )

    def archive(self, k: int | Int[Array, ""]) -> ArchiveView:
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
    scores: Float[Array, "capacity tasks"],
    cells: Int[Array, "tasks cells"],
    k: Int[Array, ""],
) -> ArchiveView:
    indices = cells[k]
    occupied = (indices != EMPTY)[:, None]
    elites = scores[jnp.maximum(indices, 0)]
    quality = jnp.take(elites, k[None], axis=1)
    behaviour = jnp.take(elites, other_tasks(scores.shape[1], k), axis=1)
    behaviour = jnp.where(occupied, behaviour, 0.0)
    return ArchiveView(
        genotypes=indices,
        fitnesses=jnp.where(occupied, quality, -jnp.inf),
        descriptors=behaviour,
        centroids=behaviour,
        extra_scores={},
        keys_extra_scores=(),
    )


@jax.jit
def _full_view(repertoire: PooledRepertoire, k: Int[Array, ""]) -> ArchiveView:
    view = repertoire.index_archive(k)
    return view.replace(
        genotypes=jax.tree.map(partial(_take_elites, view.genotypes), repertoire.genotypes)
    )


def _take_elites(indices: Int[Array, " cells"], pool: jax.Array) -> jax.Array:
    occupied = (indices != EMPTY).reshape(-1, *[1] * (pool.ndim - 1))
    return jnp.where(occupied, pool[jnp.maximum(indices, 0)], jnp.zeros((), pool.dtype))


def _written(  # operands of one kernel
    pool: tuple[Any, Float[Array, "capacity tasks"], Any, Int[Array, "tasks cells"]],
    decision: Decision,
    genotypes: Any,
    scores: Float[Array, "batch tasks"],
    extra_scores: Any,
    capacity: int,
) -> tuple[Any, ...]:
    old_genotypes, old_scores, old_extra_scores, old_cells = pool
    more = capacity - old_scores.shape[0]
    used = jnp.pad(decision.used, (0, more))
    slot, cells = assign_slots(decision.replace(used=used), old_cells)

    def put(old: jax.Array, new: jax.Array, fill: float = 0) -> jax.Array:
        grown = jnp.pad(old, [(0, more)] + [(0, 0)] * (old.ndim - 1), constant_values=fill)
        return grown.at[slot].set(new, mode="drop")

    staying = jnp.where(decision.used[:, None], old_scores, -jnp.inf)
    return (
        jax.tree.map(put, old_genotypes, genotypes),
        put(staying, scores, -jnp.inf),
        jax.tree.map(put, old_extra_scores, extra_scores),
        cells,
    )


_write = jax.jit(_written, static_argnames="capacity")
_write_in_place = jax.jit(_written, static_argnames="capacity", donate_argnames="pool")


def _one(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), tree)


def _zeros(tree: Any, slots: int) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((slots, *jnp.shape(x)[1:]), jnp.result_type(x)), tree)


def _batch_size(genotypes: Any) -> int:
    leaves = jax.tree.leaves(genotypes)
    if not leaves or jnp.ndim(leaves[0]) == 0:
        raise ValueError("expected genotypes with a leading batch axis, found none")
    return int(jnp.shape(leaves[0])[0])


def _default_capacity(genotypes: Any, shape: tuple[int, int], batch: int) -> int:
    worst = shape[0] * shape[1]
    bytes_each = sum(
        int(np.prod(jnp.shape(x)[1:])) * jnp.result_type(x).itemsize
        for x in jax.tree.leaves(genotypes)
    )
    return worst if worst * bytes_each <= FULL_POOL_BYTES else min(worst, max(batch, 64))


def _check_scores(fitnesses: Any, descriptors: Any, batch: int, tasks: int) -> jax.Array:
    for name, array in (("fitnesses", fitnesses), ("descriptors", descriptors)):
        if tuple(jnp.shape(array)) != (batch, tasks):
            raise ValueError(
                f"{name}: expected scores of shape {(batch, tasks)}, one row a genotype "
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
