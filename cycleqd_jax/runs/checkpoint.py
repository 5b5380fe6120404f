"""Checkpoints of a run: any pytree plus JSON counters, exact, atomic, and checked when read back.

Orbax writes and renames the folders. A checkpoint is two items: ``state``, the tree's leaves, and
``index``, JSON with every leaf's path, shape, dtype and checksum, the static fields and the
counters. The index lets a restore take the shapes from the checkpoint (a pool of genotypes may have
grown since the template was made), hold the structure against the template, and notice damage.
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from cycleqd_jax.runs.files import explain_no_space, from_json, to_json
from cycleqd_jax.runs.leaves import (
    checksum,
    leaf_index,
    mismatches,
    named_leaves,
    rebuild,
    static_fields,
    to_numpy,
)

_FORMAT = 1
_PREFIX = "generation"


class CheckpointError(ValueError):
    """A checkpoint cannot be used: damaged, or of another structure than the program's state."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was set aside and an older one is used."""


@dataclass(frozen=True)
class Restored:
    """What came back.

    Attributes:
        generation: the generation after which it was saved.
        state: a tree of the template's types.
        counters: the JSON counters.
    """

    generation: int
    state: Any
    counters: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in ``folder/generation_NNNNNN``; keeps the newest `keep`.

    Saving is synchronous (about 50 ms for 10 MB): a checkpoint exists when `save` returns.
    """

    def __init__(self, folder: Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint, found {keep}")
        self.folder = folder.absolute()
        with explain_no_space(self.folder):
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_names=("state", "index"),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    step_prefix=_PREFIX,
                    step_format_fixed_length=6,
                    enable_async_checkpointing=False,
                    cleanup_tmp_directories=True,
                ),
            )

    def generations(self) -> list[int]:
        """The generations saved, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest generation saved, or None."""
        return max(self._manager.all_steps(), default=None)

    def save(self, generation: int, state: Any, counters: Mapping[str, Any]) -> bool:
        """Saves the state after a generation; False if that generation is saved already.

        Args:
            generation: not older than the newest checkpoint.
            state: any pytree of arrays (typed random keys included) and Python numbers.
            counters: anything JSON can hold.

        Raises:
            ValueError: for an older generation, or a leaf that is no array or number.
            NoSpaceError: if the disk is full; older checkpoints are untouched.
        """
        latest = self.latest()
        if latest is not None and generation <= latest:
            if generation in self.generations():
                return False
            raise ValueError(
                f"checkpoint: expected a generation after {latest}, found {generation}"
            )
        leaves = named_leaves(state)
        arrays = [to_numpy(leaf, name) for name, leaf in leaves]
        index = {
            "format": _FORMAT,
            "leaves": [
                leaf_index(name, leaf, a) for (name, leaf), a in zip(leaves, arrays, strict=True)
            ],
            "static": static_fields(state),
            "counters": to_json(counters, "counters"),
        }
        with explain_no_space(self.folder / _name(generation)):
            try:
                self._write(generation, arrays, index)
            except Exception:
                self._clear_unfinished()
                raise
        return True

    def restore(self, template: Any, generation: int | None = None) -> Restored | None:
        """Reads the newest checkpoint back (or that of `generation`); None if there is none.

        A damaged checkpoint is renamed to ``damaged_generation_NNNNNN`` with a `CheckpointWarning`
        that says so, and the one before is read.

        Args:
            template: a tree of the state's structure, types, static fields, dtypes and ranks; its
                shapes and values do not matter.
            generation: which one to read; the newest by default.

        Raises:
            CheckpointError: if every checkpoint is damaged, if the one asked for is damaged or does
                not exist, or if its structure is not the template's.
        """
        if generation is not None:
            if generation not in self.generations():
                raise CheckpointError(
                    f"{self.folder}: expected one of the generations {self.generations()}, "
                    f"found {generation}"
                )
            return self._read(generation, template)
        damaged: list[str] = []
        for step in reversed(self.generations()):
            try:
                return self._read(step, template)
            except _DamagedError as error:
                damaged.append(str(error))
                self._set_aside(step, str(error))
        if damaged:
            raise CheckpointError(
                "no checkpoint can be read:\n  " + "\n  ".join(damaged) + "\nRestore one of these "
                "folders from a copy, or remove the run's folder to start over"
            )
        return None

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, generation: int, arrays: list[np.ndarray], index: dict[str, Any]) -> None:
        # Storage has no empty arrays (a matrix no expert touched has rank 0): the index keeps them.
        stored = {_key(i): a for i, a in enumerate(arrays) if a.size}
        items = {"index": ocp.args.JsonSave({**index, "checksum": _checksum_of(index)})}
        if stored:
            items["state"] = ocp.args.StandardSave(stored)
        self._manager.save(generation, args=ocp.args.Composite(**items))
        self._manager.wait_until_finished()

    def _read(self, generation: int, template: Any) -> Restored:
        index = self._read_index(generation)
        wrong = mismatches(template, index["leaves"], index["static"])
        if wrong:
            raise CheckpointError(
                f"{self.folder / _name(generation)} is of another structure than this program's "
                "state:\n"
                + "".join(f"  {line}\n" for line in wrong)
                + "Resume with the code and settings that wrote it, or start in another folder"
            )
        arrays = self._read_arrays(generation, index["leaves"])
        return Restored(generation, rebuild(template, arrays), from_json(index["counters"]))

    def _read_index(self, generation: int) -> dict[str, Any]:
        try:
            index = self._manager.restore(
                generation, args=ocp.args.Composite(index=ocp.args.JsonRestore())
            )["index"]
            found = index.pop("checksum")
            if found != _checksum_of(index):
                raise ValueError("the checksum of its index is wrong")
        except Exception as error:
            raise _DamagedError(self.folder / _name(generation), error) from error
        if index["format"] != _FORMAT:
            raise CheckpointError(
                f"{self.folder / _name(generation)}: expected checkpoint format {_FORMAT}, "
                f"found {index['format']}; use the library version that wrote it"
            )
        return dict(index)

    def _read_arrays(self, generation: int, leaves: list[dict[str, Any]]) -> list[np.ndarray]:
        targets = {_key(i): np.empty(leaf["shape"], leaf["dtype"]) for i, leaf in enumerate(leaves)}
        stored = {key: target for key, target in targets.items() if target.size}
        try:
            if stored:
                restore = ocp.args.Composite(state=ocp.args.StandardRestore(stored))
                targets.update(self._manager.restore(generation, args=restore)["state"])
            arrays = [np.asarray(targets[_key(i)]) for i in range(len(leaves))]
            for leaf, array in zip(leaves, arrays, strict=True):
                if checksum(array) != leaf["checksum"]:
                    raise ValueError(f"the checksum of {leaf['path']} is wrong")
        except Exception as error:
            raise _DamagedError(self.folder / _name(generation), error) from error
        return arrays

    def _set_aside(self, generation: int, why: str) -> None:
        source = self.folder / _name(generation)
        target = self.folder / f"damaged_{source.name}"
        shutil.rmtree(target, ignore_errors=True)
        source.rename(target)
        self._manager.reload()
        warnings.warn(
            f"{why}. It was renamed to {target.name}; the checkpoint before it is used",
            CheckpointWarning,
            stacklevel=3,
        )

    def _clear_unfinished(self) -> None:
        for leftover in self.folder.glob(f"{_PREFIX}_*orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._manager.reload()


class _DamagedError(Exception):
    def __init__(self, path: Path, error: Exception):
        reason = " ".join(str(error).split())[:300]
        super().__init__(f"the checkpoint {path} is damaged ({type(error).__name__}: {reason})")


def _checksum_of(index: Mapping[str, Any]) -> int:
    return checksum(np.frombuffer(json.dumps(index, sort_keys=True).encode(), np.uint8))


def _name(generation: int) -> str:
    return f"{_PREFIX}_{generation:06d}"


def _key(position: int) -> str:
    return f"leaf_{position:05d}"
