"""The CycleQD emitter: select two parents, merge them, mutate the child.

Selector, crossover, mutation and schedule are plain parts; swap any of them with a function (or a
small class for the selector) of your own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Sharding
from jax.tree_util import Partial, all_leaves
from jaxtyping import Array, Float, Int, Key, UInt32
from qdax.core.emitters.emitter import Emitter, EmitterState
from qdax.core.emitters.repertoire_selectors.selector import Selector

from cycleqd_jax.merging.crossover import Crossover
from cycleqd_jax.merging.mutation import Mutation
from cycleqd_jax.qd.pool import PooledRepertoire
from cycleqd_jax.qd.schedule import Schedule, cycle_per_generation
from cycleqd_jax.qd.selection import draw_parents


class CycleQDState(EmitterState):
    """State of the emitter.

    Attributes:
        generation: int32 scalar, generations told so far.
    """

    generation: Any


class Offspring(struct.PyTreeNode):
    """A batch of children.

    Attributes:
        genotypes: tree with leaves (B, ...).
        parents: (B, 2) int32 pool indices at the time of birth; an index may be given to another
            elite later.
        archive: (B,) int32, the archive each child was bred in.
        keys: (B, 2, words) uint32, data of the random keys of crossover and mutation. With the
            parents' genotypes, the archive and the parameters they are the whole recipe of a child.
        parameters: (B, P) float32, values of the operators' parameters, the crossover's first; None
            where none is chosen.
    """

    genotypes: Any
    parents: Any
    archive: Any
    keys: Any
    parameters: Any = None


def as_pytree(operator: Callable[..., Any]) -> Any:
    """An operator as an argument of a compiled function.

    One that is a pytree (a Partial, a struct with ``__call__``) brings its arrays along; a plain
    function is static.
    """
    return Partial(operator) if all_leaves([operator]) else operator


def _check_shards(sharding: Sharding, batch_size: int) -> None:
    try:
        sharding.shard_shape((batch_size,))
    except ValueError as error:
        raise ValueError(
            f"a batch of {batch_size} children cannot be split evenly: expected a multiple of the "
            f"shards of {sharding}"
        ) from error


@partial(
    jax.jit,
    static_argnames=("selector", "schedule", "experts", "batch_size", "sharding", "choose_values"),
)
def breed(
    repertoire: PooledRepertoire,
    state: Any,
    key: jax.Array,
    crossover: Any,
    mutation: Any,
    *,
    selector: Selector,
    schedule: Schedule,
    experts: tuple[int, ...],
    batch_size: int,
    sharding: Sharding | None = None,
    choose_values: Callable[..., Any] | None = None,
) -> Offspring:
    """One batch of children.

    Every child has its own three keys: for selection, crossover and mutation.

    Args:
        repertoire: where parents come from.
        state: the emitter's, whose ``generation`` is the counter for the schedule.
        key: random key.
        crossover: pytree callable, see ``cycleqd_jax.merging.crossover``.
        mutation: pytree callable, see ``cycleqd_jax.merging.mutation``.
        selector: draws parents from an index view of an archive; hashable.
        schedule: which archive each child is bred in.
        experts: expert whose directions a child of archive k is mutated along, one an archive.
        batch_size: number of children B.
        sharding: how the children's leading axis is split over devices.
        choose_values: ``(repertoire, state, parents, archive, crossover, mutation) -> (B, P)``, the
            values of the operators' parameters, for operators that take such (`qd.parametric`).
    """
    archive = schedule(state.generation, batch_size, repertoire.num_archives)
    archive = split_batch(archive, sharding)
    keys = split_batch(jax.random.split(key, (batch_size, 3)), sharding)
    parents = draw_parents(selector, repertoire, keys[:, 0], archive)
    values = None
    if choose_values is not None:
        values = choose_values(repertoire, state, parents, archive, crossover, mutation)
    pairs = repertoire.gather(parents[:, 0]), repertoire.gather(parents[:, 1])
    children = mate(*pairs, archive, keys[:, 1:], values, crossover, mutation, experts)
    return Offspring(
        genotypes=split_batch(children, sharding),
        parents=parents,
        archive=archive,
        keys=jax.random.key_data(keys[:, 1:]),
        parameters=values,
    )


@partial(jax.jit, static_argnames="experts")
def breed_again(
    first: Any,
    second: Any,
    archive: Int[Array, " batch"],
    keys: UInt32[Array, "batch 2 words"],
    values: Float[Array, "batch parameters"] | None,
    crossover: Any,
    mutation: Any,
    *,
    experts: tuple[int, ...],
) -> Any:
    """Children of a former batch from their recipes; see `CycleQDEmitter.recreate`."""
    drawn = jax.random.wrap_key_data(keys)
    return mate(first, second, archive, drawn, values, crossover, mutation, experts)


def split_batch(x: Any, sharding: Sharding | None) -> Any:
    """A tree of one row a child, split over devices; as it is without a sharding."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def mate(
    first: Any,
    second: Any,
    archive: Int[Array, " batch"],
    keys: Key[Array, "batch 2"],
    values: Float[Array, "batch parameters"] | None,
    crossover: Any,
    mutation: Any,
    experts: tuple[int, ...],
) -> Any:
    """Genotypes of the children of chosen parents.

    Args:
        first: genotypes of the first parents, leaves (B, ...).
        second: genotypes of the second parents.
        archive: archive each child is bred in.
        keys: two a child, for crossover and mutation.
        values: of the operators' parameters, the crossover's first; None if they take none.
        crossover: as for `breed`, likewise the next.
        mutation: pytree callable.
        experts: expert of every archive.
    """
    cross, mutate = jax.vmap(crossover), jax.vmap(mutation)
    if values is not None:
        ours = len(crossover.parameters)
        cross, mutate = partial(cross, values[:, :ours]), partial(mutate, values[:, ours:])
    children = cross(keys[:, 0], first, second)
    return mutate(keys[:, 1], children, jnp.asarray(experts, jnp.int32)[archive])


class CycleQDEmitter(Emitter):
    """QDax emitter of CycleQD (Kuroki et al., ICLR 2025, arXiv 2410.14735)."""

    _choose_values: Callable[..., Any] | None = None
    """As for `breed`; an emitter that chooses the operators' parameters has one."""

    def __init__(
        self,
        selector: Selector,
        crossover: Crossover,
        mutation: Mutation,
        batch_size: int,
        num_archives: int,
        *,
        schedule: Schedule = cycle_per_generation,
        expert_of_archive: Sequence[int] | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            selector: draws two parents from one archive; any QDax selector, hashable.
            crossover: ``(key, a, b) -> child``. A pytree that is callable
                (``jax.tree_util.Partial``) hands its arrays over as arguments; arrays in a plain
                closure become constants of the compiled function.
            mutation: ``(key, genotype, expert) -> genotype``, likewise.
            batch_size: children a generation.
            num_archives: K, the repertoire's number of archives.
            schedule: which archive each child is bred in.
            expert_of_archive: expert whose directions serve archive k; default: expert k.
            sharding: splits the children's leading axis, as ``NamedSharding(mesh,
                PartitionSpec("population"))`` does: each device breeds and scores its share. The
                mesh's axes have to be of type ``Auto``, and the repertoire on all its devices, as
                ``jax.device_put(repertoire, NamedSharding(mesh, PartitionSpec()))`` puts it.

        Raises:
            ValueError: a batch below 1 or not a multiple of the shards, fewer than two archives,
                or not one expert an archive.
        """
        if batch_size < 1:
            raise ValueError(f"expected a batch of at least 1 child, found {batch_size}")
        if num_archives < 2:
            raise ValueError(f"expected at least 2 archives, found {num_archives}")
        experts = tuple(range(num_archives) if expert_of_archive is None else expert_of_archive)
        if len(experts) != num_archives:
            raise ValueError(
                f"expert_of_archive: expected {num_archives} experts, one an archive, "
                f"found {len(experts)}"
            )
        if sharding is not None:
            _check_shards(sharding, batch_size)
        self._sharding = sharding
        self._selector = selector
        self._crossover = as_pytree(crossover)
        self._mutation = as_pytree(mutation)
        self._batch_size = batch_size
        self._schedule = schedule
        self._experts = tuple(int(e) for e in experts)

    def init(  # QDax's signature
        self,
        key: jax.Array,
        repertoire: Any,
        genotypes: Any,
        fitnesses: Any,
        descriptors: Any,
        extra_scores: Any,
    ) -> CycleQDState:
        """State at generation 0; raises ``ValueError`` if the number of archives is another."""
        if repertoire.num_archives != len(self._experts):
            raise ValueError(
                f"the emitter was made for {len(self._experts)} archives, the repertoire has "
                f"{repertoire.num_archives}"
            )
        return CycleQDState(generation=jnp.zeros((), jnp.int32))

    def emit(
        self, repertoire: Any, emitter_state: Any, key: jax.Array
    ) -> tuple[Any, dict[str, Any]]:
        """Breed a batch.

        Returns:
            Children, leaves (B, ...), and ``{"parents": (B, 2), "archive": (B,), "keys":
            (B, 2, words)}`` as in `Offspring`; with ``"parameters": (B, P)`` where they are chosen.
        """
        children = breed(
            repertoire,
            emitter_state,
            key,
            self._crossover,
            self._mutation,
            selector=self._selector,
            schedule=self._schedule,
            experts=self._experts,
            batch_size=self._batch_size,
            sharding=self._sharding,
            choose_values=self._choose_values,
        )
        info = {
            "parents": children.parents,
            "archive": children.archive,
            "keys": children.keys,
        }
        if children.parameters is not None:
            info["parameters"] = children.parameters
        return children.genotypes, info

    def recreate(self, first: Any, second: Any, info: Mapping[str, Any]) -> Any:
        """Children made earlier, bit for bit, whatever became of archives and pool.

        Args:
            first: genotypes of the first parents, leaves (B, ...).
            second: genotypes of the second parents.
            info: what `emit` said of the children: ``"archive"`` (B,), ``"keys"`` (B, 2, words) and
                ``"parameters"`` (B, P) where they are chosen. They may be of several batches.
        """
        values = None if self._choose_values is None else info["parameters"]
        return breed_again(
            first,
            second,
            info["archive"],
            info["keys"],
            values,
            self._crossover,
            self._mutation,
            experts=self._experts,
        )

    def state_update(  # QDax's signature
        self,
        emitter_state: Any,
        repertoire: Any = None,
        genotypes: Any = None,
        fitnesses: Any = None,
        descriptors: Any = None,
        extra_scores: Any = None,
    ) -> CycleQDState:
        """Count one generation."""
        return CycleQDState(generation=emitter_state.generation + 1)

    @property
    def experts(self) -> tuple[int, ...]:
        """Expert whose directions serve each archive."""
        return self._experts

    @property
    def batch_size(self) -> int:
        """Children a generation."""
        return self._batch_size
