"""Who descends from whom: one `Birth` a model ever made, and the family tree over them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cycleqd_jax.runs.jsonl import read_jsonl


@dataclass(frozen=True)
class Birth:
    """One model of the run: a seed (base, expert, merge) or a child of two parents.

    Attributes:
        id: unique in the run, in order of birth.
        parents: ids of the parents; empty for a seed, twice the same id if one elite was both.
        archive: the archive whose quality chose the parents; None for a seed.
        generation: 0 for seeds, then counted from 1.
        scores: task name to score, higher is better; non-finite ones are kept too.
        operator: how it was made (a seed's name, crossover weights, …), in JSON types.
    """

    id: int
    parents: tuple[int, ...]
    archive: int | None
    generation: int
    scores: dict[str, float]
    operator: dict[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """The birth as a row of ``lineage.jsonl``."""
        return {
            "id": self.id,
            "parents": list(self.parents),
            "archive": self.archive,
            "generation": self.generation,
            "scores": dict(self.scores),
            "operator": dict(self.operator),
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Birth":
        """The inverse of `to_row`.

        Raises:
            ValueError: if the row's entries are not those of a birth.
        """
        names = set(cls.__dataclass_fields__)
        if set(row) != names:
            raise ValueError(f"birth row: expected the keys {sorted(names)}, found {sorted(row)}")
        return cls(**{**row, "parents": tuple(row["parents"])})


def read_births(path: Path) -> list[Birth]:
    """All births of a run's ``lineage.jsonl``, oldest first.

    Raises:
        ValueError: naming the file, if a row is not a birth.
    """
    try:
        return [Birth.from_row(row) for row in read_jsonl(path)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class FamilyTree:
    """The births of a run by id.

    Raises:
        ValueError: if two births have one id.
    """

    def __init__(self, births: Iterable[Birth]):
        self._births: dict[int, Birth] = {}
        for birth in births:
            if birth.id in self._births:
                raise ValueError(f"lineage: the id {birth.id} was given twice")
            self._births[birth.id] = birth

    def birth(self, id: int) -> Birth:
        """The birth of this id; ValueError if there is none."""
        if id not in self._births:
            raise ValueError(f"lineage: no model has the id {id}; there are {len(self._births)}")
        return self._births[id]

    def ancestors(self, id: int) -> list[Birth]:
        """Every model this one descends from, each once, parents before their children."""
        found: dict[int, Birth] = {}
        waiting = list(self.birth(id).parents)
        while waiting:
            birth = self.birth(waiting.pop())
            if birth.id not in found:
                found[birth.id] = birth
                waiting.extend(birth.parents)
        return sorted(found.values(), key=lambda birth: (birth.generation, birth.id))
