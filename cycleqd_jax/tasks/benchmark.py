"""What public benchmarks share: files of the user's, and splits by what is stable in them."""

import abc
import hashlib
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from cycleqd_jax.sandbox.base import Limits
from cycleqd_jax.tasks.base import P, Split, Task

R = TypeVar("R")
Irregular = Literal["error", "skip"]

# Of every ten problems; a public benchmark trains nobody here.
_SPLIT_OF_DIGIT: tuple[Split, ...] = (
    *("search",) * 4,
    *("validation",) * 2,
    *("test",) * 4,
)


class BenchmarkTask(abc.ABC, Generic[P]):
    """A task whose problems are all there from the start.

    A frozen dataclass derives from it: its `make_problems` is called once, when its fields are set.

    Attributes:
        name: the name scores are reported under.
    """

    name: str
    _problems: tuple[P, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_problems", tuple(self.make_problems()))

    @abc.abstractmethod
    def make_problems(self) -> Iterable[P]:
        """Make all problems of all splits, in the order of the files."""

    def every_problem(self) -> list[P]:
        """All problems of all splits, in the order of the files."""
        return list(self._problems)

    def problems(self, split: Split, count: int, *, seed: int = 0, difficulty: int = 1) -> list[P]:
        """Choose ``count`` problems of one split; they have no difficulties to choose from.

        Raises:
            ValueError: the split has fewer problems, or there is no such split.
        """
        return choose_problems(self.name, self._problems, split, count, seed)


def make_records(
    makers: Iterable[tuple[str, Callable[[], R]]],
    what: str,
    folder: Path,
    irregular: Irregular,
    advice: str = "",
) -> list[R]:
    """Make every record of a benchmark; what is wrong with any of them is said at once.

    Args:
        makers: the place of each, such as file and line, and what makes it: a ValueError,
            SyntaxError or RecursionError of its says why it is irregular.
        what: the records' name, for errors.
        folder: where they are from, for errors.
        irregular: such a record is an "error", or is left out ("skip").
        advice: the task that leaves them out, for errors.

    Raises:
        ValueError: records are irregular, all of them named; or none is left.
    """
    records: list[R] = []
    wrong: list[str] = []
    for place, make in makers:
        try:
            records.append(make())
        except (ValueError, SyntaxError, RecursionError) as error:
            wrong.append(f"{place}: {str(error) or type(error).__name__}")
    if wrong and irregular == "error":
        raise ValueError(
            f"{len(wrong)} irregular {what}; correct them, or say that they are to be left out "
            f"(irregular='skip'{advice and f', task {advice}'}):\n" + "\n".join(wrong)
        )
    if not records:
        raise ValueError(f"{folder}: expected {what}, found none")
    return records


def field_of(raw: Any, name: str, kind: Any) -> Any:
    """An entry of a record's JSON.

    Args:
        raw: what the file holds; anything but an object has no entries.
        name: of the entry.
        kind: its type, or a union of such; True and False are no numbers.

    Raises:
        ValueError: there is none, or it is of another type.
    """
    value = raw.get(name) if isinstance(raw, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = getattr(kind, "__name__", str(kind))
        found = "nothing" if value is None else repr(value)[:60]
        raise ValueError(f"{name}: expected {expected}, found {found}")
    return value


def split_of_group(group: str) -> Split:
    """The split of all problems of one group, whatever else is in the files.

    Args:
        group: a problem's id, or what it shares with others that must not be told apart: the
            split would leak through a table, a set-up or a solution that two problems have.
    """
    digest = hashlib.blake2b(group.encode(), digest_size=8).digest()
    return _SPLIT_OF_DIGIT[int.from_bytes(digest) % len(_SPLIT_OF_DIGIT)]


def choose_problems(
    name: str, problems: Iterable[P], split: Split, count: int, seed: int
) -> list[P]:
    """Choose ``count`` problems of one split; the same seed chooses the same ones.

    Args:
        name: the task's, for the draw and for errors.
        problems: all there are; `Problem.solution` is the group that decides the split.
        split: "search", "validation" or "test".
        count: how many distinct problems.
        seed: of the draw.

    Raises:
        ValueError: the split has fewer problems, or there is no such split.
    """
    everything = list(problems)
    found = [problem for problem in everything if split_of_group(problem.solution) == split]
    if len(found) < count:
        raise ValueError(
            f"expected {count} problems in split {split!r} of {name}, found {len(found)} "
            f"of {len(everything)}: ask for fewer (splits: search, validation, test)"
        )
    return random.Random(f"{name}/{split}/{seed}").sample(found, count)


def data_folder(task: str, folder: str, files: str) -> Path:
    """The folder of a benchmark's files below ``$CYCLEQD_DATA``.

    Args:
        task: who asks, for the error.
        folder: below ``$CYCLEQD_DATA``, such as ``agentbench/dbbench``.
        files: what the user has to put there and where it is from, for the error.

    Raises:
        ValueError: ``$CYCLEQD_DATA`` is not set.
    """
    data = os.environ.get("CYCLEQD_DATA")
    if not data:
        raise ValueError(f"task {task}: set CYCLEQD_DATA to a folder that holds {folder}/{files}")
    return Path(data) / folder


def sandbox_limits(tasks: Iterable[Task]) -> Limits:
    """What a sandbox has to allow the programs of all these tasks.

    Args:
        tasks: those with an attribute ``limits`` need that much, the others the usual `Limits`.
    """
    wanted = [Limits(), *(getattr(task, "limits", Limits()) for task in tasks)]
    names = [field.name for field in fields(Limits)]
    return Limits(**{name: max(getattr(each, name) for each in wanted) for name in names})
