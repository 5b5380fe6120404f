"""Checkpoints of a run: any pytree plus JSON counters, exact, atomic, and checked when read back.

Orbax writes and renames the folders. A checkpoint is two items: ``state``, the tree's leaves, and
``index``, JSON with every leaf's path, shape and dtype, the static fields and the counters. The
index lets a restore take the shapes from the checkpoint (a pool of genotypes may have grown since
the template was made) and hold the structure against the template. ``files.json`` lists the size
and checksum of every file, so that damage is found before anything is read.
"""

import shutil
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from cycleqd_jax.atomic import explain_no_space
from cycleqd_jax.runs.records.files import from_json, read_json, to_json, write_json_atomic
from cycleqd_jax.runs.records.leaves import (
    leaf_index,
    mismatches,
    named_leaves,
    rebuild,
    static_fields,
    to_numpy,
)

_FORMAT = 1
_PREFIX = "generation"
_MANIFEST = "files.json"


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
    """The checkpoints of one run in ``folder/generation_NNNNNN``.

    Saving is synchronous (about 50 ms for 10 MB): a checkpoint exists when `save` returns.

    Args:
        folder: where they lie.
        keep: the newest that stay.
        keep_every: those of the generations that this number divides stay too; None: no others.

    Raises:
        ValueError: one of the numbers is below 1.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_every: int | None = None):
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint, found {keep}")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every: expected at least 1 generation, found {keep_every}")
        self.folder = folder.absolute()
        with explain_no_space(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_names=("state", "index"),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    keep_period=keep_every,
                    step_prefix=_PREFIX,
                    step_format_fixed_length=6,
                    enable_async_checkpointing=False,
                    cleanup_tmp_directories=True,
                    create=False,
                    # Of several hosts one alone keeps checkpoints; Orbax would wait for all.
                    multiprocessing_options=ocp.options.MultiprocessingOptions(
                        primary_host=jax.process_index(), active_processes={jax.process_index()}
                    )
                    if jax.process_count() > 1
                    else ocp.options.MultiprocessingOptions(),
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
        items = {"index": ocp.args.JsonSave(index)}
        if stored:
            items["state"] = ocp.args.StandardSave(stored)
        self._manager.save(generation, args=ocp.args.Composite(**items))
        self._manager.wait_until_finished()
        folder = self.folder / _name(generation)
        write_json_atomic(folder / _MANIFEST, _fingerprints(folder))

    def _read(self, generation: int, template: Any) -> Restored:
        folder = self.folder / _name(generation)
        verified = _verify(folder)
        try:
            index = self._restore(generation, "index", ocp.args.JsonRestore())
            self._check(folder, index, template)
            arrays = self._read_arrays(generation, index["leaves"])
        except CheckpointError:
            raise
        except Exception as error:
            if verified:  # the files are as they were written: whatever this is, it is no damage
                raise
            raise _DamagedError(folder, str(error)) from error
        return Restored(generation, rebuild(template, arrays), from_json(index["counters"]))

    def _check(self, folder: Path, index: Mapping[str, Any], template: Any) -> None:
        if index["format"] != _FORMAT:
            raise CheckpointError(
                f"{folder}: expected checkpoint format {_FORMAT}, found {index['format']}; "
                "use the library version that wrote it"
            )
        wrong = mismatches(template, index["leaves"], index["static"])
        if wrong:
            raise CheckpointError(
                f"{folder} is of another structure than this program's state:\n"
                + "".join(f"  {line}\n" for line in wrong)
                + "Resume with the code and settings that wrote it, or start in another folder"
            )

    def _read_arrays(self, generation: int, leaves: list[dict[str, Any]]) -> list[np.ndarray]:
        arrays = {_key(i): np.empty(leaf["shape"], leaf["dtype"]) for i, leaf in enumerate(leaves)}
        stored = {key: target for key, target in arrays.items() if target.size}
        if stored:
            arrays |= self._restore(generation, "state", ocp.args.StandardRestore(stored))
        return [np.asarray(arrays[_key(i)]) for i in range(len(leaves))]

    def _restore(self, generation: int, item: str, how: Any) -> Any:
        return self._manager.restore(generation, args=ocp.args.Composite(**{item: how}))[item]

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
    def __init__(self, folder: Path, reason: str):
        super().__init__(f"the checkpoint {folder} is damaged ({' '.join(reason.split())[:300]})")


def _fingerprints(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file below the folder but the manifest."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _MANIFEST):
        with open(path, "rb") as file:
            size = checksum = 0
            while block := file.read(1 << 20):
                size, checksum = size + len(block), zlib.crc32(block, checksum)
        found[path.relative_to(folder).as_posix()] = [size, checksum]
    return found


def _verify(folder: Path) -> bool:
    """True: every file is as written. False: killed before the manifest was, so nobody knows.

    Raises:
        _DamagedError: if a file is not as it was written.
    """
    if not (folder / _MANIFEST).exists():
        return False
    try:
        written = read_json(folder / _MANIFEST)
    except ValueError as error:
        raise _DamagedError(folder, str(error)) from error
    found = _fingerprints(folder)
    if written != found:
        names = [n for n in {**written, **found} if written.get(n) != found.get(n)]
        raise _DamagedError(folder, f"changed since it was written: {', '.join(names)}")
    return True


def _name(generation: int) -> str:
    return f"{_PREFIX}_{generation:06d}"


def _key(position: int) -> str:
    return f"leaf_{position:05d}"
