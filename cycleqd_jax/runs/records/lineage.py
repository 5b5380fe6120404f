"""Who descends from whom: one `Birth` a model ever made, and the family tree over them.

`cycleqd_jax.runs.rebuild` breeds a model again from its birth and those of its ancestors.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cycleqd_jax.runs.records.jsonl import read_jsonl


class LineageError(ValueError):
    """The log of births is damaged or incomplete; the message says where."""


@dataclass(frozen=True)
class Birth:
    """One model of the run: a first parent (an expert) or a child of two parents.

    Attributes:
        id: unique in the run, in order of birth.
        parents: ids of the parents; empty for a first parent, twice the same id if one elite was
            both.
        archive: the archive whose quality chose the parents; None for a first parent.
        generation: 0 for first parents, then counted from 1.
        scores: task name to score, higher is better; non-finite ones are kept too.
        problems: how many problems of each task, in their order, the scores rest on, where these
            are not all: those of a child that was left out are estimates. None: all of them.
        operator: how it was made, in JSON types. A first parent: ``expert``, its name. A child:
            ``keys``, the data of the random keys of crossover and mutation, which with the parents
            and the archive are its exact recipe (a controlled emitter's ``parameters`` belong to
            it); and to read, ``weights`` or ``place``, what the crossover drew, and ``expert``,
            whose directions the mutation went along.
        digest: of the genotype, bit for bit; see `cycleqd_jax.runs.rebuild.digests`.
        time: when it had been scored, in seconds since 1970.
    """

    id: int
    parents: tuple[int, ...]
    archive: int | None
    generation: int
    scores: dict[str, float]
    operator: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    time: float = 0.0
    problems: list[int] | None = None

    def to_row(self) -> dict[str, Any]:
        """The birth as a row of ``lineage.jsonl``."""
        row = {**vars(self), "parents": list(self.parents)}
        if self.problems is None:
            del row["problems"]
        return row

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Birth":
        """The inverse of `to_row`.

        Raises:
            LineageError: if the row's entries are not those of a birth.
        """
        names = set(cls.__dataclass_fields__)
        if set(row) | {"problems"} != names:
            raise LineageError(f"birth row: expected the keys {sorted(names)}, found {sorted(row)}")
        whole = all(isinstance(row[name], int) for name in ("id", "generation"))
        parents, scores = row["parents"], row["scores"]
        if not (
            whole
            and isinstance(parents, list)
            and all(isinstance(parent, int) for parent in parents)
            and isinstance(scores, dict)
            and isinstance(row["operator"], dict)
        ):
            raise LineageError(f"birth row: expected numbers, a list and mappings, found {row}")
        return cls(**{**row, "parents": tuple(parents)})


def read_births(path: Path) -> list[Birth]:
    """All births of a run's ``lineage.jsonl``, oldest first.

    Raises:
        LineageError: naming the file, if a row is not a birth.
    """
    try:
        return [Birth.from_row(row) for row in read_jsonl(path)]
    except ValueError as error:
        raise LineageError(f"{path}: {error}") from error


class FamilyTree:
    """The births of a run by id.

    Raises:
        LineageError: if two births have one id.
    """

    def __init__(self, births: Iterable[Birth]):
        self._births: dict[int, Birth] = {}
        for birth in births:
            if birth.id in self._births:
                raise LineageError(f"lineage: the id {birth.id} was given twice")
            self._births[birth.id] = birth

    @property
    def first_parents(self) -> list[Birth]:
        """The births of generation 0."""
        return [birth for birth in self._births.values() if birth.generation == 0]

    def birth(self, id: int) -> Birth:
        """The birth of this id; ValueError if there is none."""
        if id not in self._births:
            raise ValueError(f"lineage: no model has the id {id}; there are {len(self._births)}")
        return self._births[id]

    def parents(self, birth: Birth) -> list[Birth]:
        """The births of its parents.

        Raises:
            LineageError: the log lacks one, or one is not older than its child.
        """
        found = []
        for id in birth.parents:
            if id not in self._births:
                raise LineageError(
                    f"lineage: child {birth.id} of generation {birth.generation} names the parent "
                    f"{id}, which is not in the log: it is incomplete, restore it from a copy"
                )
            parent = self._births[id]
            if parent.generation >= birth.generation:
                raise LineageError(
                    f"lineage: child {birth.id} is of generation {birth.generation} and its parent "
                    f"{id} of {parent.generation}: the log is damaged, restore it from a copy"
                )
            found.append(parent)
        return found

    def ancestors(self, *ids: int) -> list[Birth]:
        """Every model that these descend from, each once, parents before their children.

        Raises:
            ValueError: no model has one of the ids.
            LineageError: as `parents`.
        """
        found: dict[int, Birth] = {}
        waiting = [parent for id in ids for parent in self.parents(self.birth(id))]
        while waiting:
            birth = waiting.pop()
            if birth.id not in found:
                found[birth.id] = birth
                waiting.extend(self.parents(birth))
        return sorted(found.values(), key=lambda birth: (birth.generation, birth.id))
