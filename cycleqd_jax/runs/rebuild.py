"""Any model a run ever made, bred again bit for bit from the experts and the log of births.

A child is a pure function of its parents' genotypes, its archive and its two random keys. So the
ancestors are bred again, generation by generation, by the emitter that made them; no checkpoint is
read. Every child takes the row it had in its batch, in a batch of the same size: some operators
round differently in other sizes (SLERP's sums do). Each result is held against the digest the log
has of it, so that nothing is ever rebuilt wrongly without a word.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.qd.emitter import CycleQDEmitter
from cycleqd_jax.runs.records.lineage import Birth, FamilyTree, LineageError


def digests(genotypes: Any) -> list[str]:
    """A digest of all bits of every row of a batch of genotypes, leaves (B, ...)."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(genotypes)]
    return [_digest([leaf[row] for leaf in leaves]) for row in range(len(leaves[0]))]


def _digest(leaves: Iterable[np.ndarray]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for leaf in leaves:
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def rebuild(
    family: FamilyTree,
    ids: Sequence[int],
    emitter: CycleQDEmitter,
    first_parents: Any,
) -> Any:
    """Genotypes of models of a run.

    Args:
        family: all births of the run.
        ids: which models, archived or not.
        emitter: the run's.
        first_parents: genotypes of the first parents in the order of their ids, leaves (E, ...).

    Returns:
        Tree with leaves (len(ids), ...).

    Raises:
        ValueError: no model has one of the ids.
        LineageError: the log is damaged or incomplete, or what comes out has not the digest that
            the log says.
    """
    wanted = {birth.id: birth for birth in family.ancestors(*ids)}
    wanted |= {id: family.birth(id) for id in ids}
    generations: dict[int, list[Birth]] = {}
    for birth in sorted(wanted.values(), key=lambda birth: (birth.generation, birth.id)):
        generations.setdefault(birth.generation, []).append(birth)
    # A long line of ancestors would fill the memory: each is kept until its last child is bred.
    last_use = {
        parent: generation
        for generation, births in generations.items()
        for birth in births
        for parent in birth.parents
    }
    kept = set(ids)
    unneeded: dict[int, list[int]] = {}
    for id, generation in last_use.items():
        if id not in kept:
            unneeded.setdefault(generation, []).append(id)
    treedef: Any = jax.tree.structure(first_parents)
    seeds = [np.asarray(leaf) for leaf in jax.tree.leaves(first_parents)]
    experts = len(seeds[0])
    made: dict[int, list[np.ndarray]] = {}
    for generation, births in generations.items():
        if generation == 0:
            made |= {
                birth.id: [leaf[_row(birth, experts, 0)] for leaf in seeds] for birth in births
            }
        else:
            made |= _breed(births, made, emitter, treedef, experts)
        for birth in births:
            _check(birth, _digest(made[birth.id]))
        for id in unneeded.get(generation, ()):
            del made[id]
    columns = zip(*(made[id] for id in ids), strict=True)
    return treedef.unflatten([jnp.asarray(np.stack(column)) for column in columns])


def _breed(
    births: Sequence[Birth],
    made: Mapping[int, list[np.ndarray]],
    emitter: CycleQDEmitter,
    treedef: Any,
    experts: int,
) -> dict[int, list[np.ndarray]]:
    """Some children of one generation, each in its own row of the batch."""
    size = emitter.batch_size
    start = experts + (births[0].generation - 1) * size
    # The other rows are bred too, as copies of the first child that is asked for.
    members = [births[0]] * size
    for birth in births:
        members[_row(birth, size, start)] = birth
    first, second = (
        treedef.unflatten([np.stack(column) for column in zip(*parents, strict=True)])
        for parents in ([made[birth.parents[side]] for birth in members] for side in (0, 1))
    )
    recipes = [_recipe(birth) for birth in members]
    info = {name: np.stack([recipe[name] for recipe in recipes]) for name in recipes[0]}
    children = jax.tree.leaves(emitter.recreate(first, second, info))
    rows = {birth.id: _row(birth, size, start) for birth in births}
    leaves = [np.asarray(leaf) for leaf in children]
    return {id: [leaf[row] for leaf in leaves] for id, row in rows.items()}


def _row(birth: Birth, size: int, start: int) -> int:
    row = birth.id - start
    if not 0 <= row < size:
        raise LineageError(
            f"lineage: expected the ids {start} to {start + size - 1} in generation "
            f"{birth.generation}, found {birth.id}: the log is of another run or damaged"
        )
    return row


def _recipe(birth: Birth) -> dict[str, np.ndarray]:
    """The recipe of a child as `CycleQDEmitter.emit` gave it, but for the parents."""
    keys = np.asarray(birth.operator.get("keys", ()), np.uint32)
    if len(birth.parents) != 2 or birth.archive is None or keys.ndim != 2 or len(keys) != 2:
        raise LineageError(
            f"lineage: child {birth.id}: expected two parents, an archive and two random keys, "
            f"found {birth.to_row()}: the log is damaged, restore it from a copy"
        )
    found = {"archive": np.asarray(birth.archive, np.int32), "keys": keys}
    if "parameters" in birth.operator:
        found["parameters"] = np.asarray(birth.operator["parameters"], np.float32)
    return found


def _check(birth: Birth, found: str) -> None:
    if birth.digest != found:
        raise LineageError(
            f"lineage: model {birth.id} of generation {birth.generation} does not come out as it "
            f"was: expected the digest {birth.digest or 'none'}, found {found}. Either the log was "
            "changed, or JAX is of another version or on other hardware than in the run"
        )
