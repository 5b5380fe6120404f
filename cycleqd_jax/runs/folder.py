"""The folder of one run: where everything lies, whose run it is, and who may write to it now."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cycleqd_jax.runs.files import (
    explain_no_space,
    from_json,
    read_json,
    to_json,
    write_json_atomic,
)

_ABSENT = object()


class RunFolderError(ValueError):
    """The folder cannot serve this run; the message says why and what to do. Nothing is lost."""


class RunFolder:
    """An opened run folder, locked against a second process until `close` (or the process ends).

    Layout: ``config.json``, ``compatibility.json``, ``metrics.jsonl``, ``lineage.jsonl``,
    ``archives.png``, ``curves.png``, ``summary.json``, ``checkpoints/``, ``best/``, ``aggregate/``.

    Attributes:
        path: the folder.
        config: the run's settings as they read back from JSON.
        resumed: True if the folder already held a run of the same settings.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], resumed: bool, lock: int):
        self.path = path
        self.config = config
        self.resumed = resumed
        self._lock: int | None = lock

    @classmethod
    def open(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> "RunFolder":
        """Creates the folder and writes its config, or takes up the run of equal config there.

        Raises:
            RunFolderError: if the path is a file, is not writable, is in use by another process,
                holds other files but no run, or holds a run of another config.
            NoSpaceError: if the disk is full.
        """
        path = Path(path)
        wanted = from_json(to_json(config, "config"))
        _refuse_foreign(path)
        lock = _create_and_lock(path)
        try:
            resumed = _claim(path, wanted)
        except BaseException:
            _unlock(lock)
            raise
        return cls(path, wanted, resumed, lock)

    def close(self) -> None:
        """Gives the lock back; the files stay."""
        if self._lock is not None:
            _unlock(self._lock)
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def config_file(self) -> Path:
        """The settings the run was started with."""
        return self.path / "config.json"

    @property
    def compatibility_file(self) -> Path:
        """How the experts relate to the base and to each other."""
        return self.path / "compatibility.json"

    @property
    def metrics_file(self) -> Path:
        """One row a generation."""
        return self.path / "metrics.jsonl"

    @property
    def lineage_file(self) -> Path:
        """One row a child."""
        return self.path / "lineage.jsonl"

    @property
    def archives_picture(self) -> Path:
        """What the archives hold."""
        return self.path / "archives.png"

    @property
    def curves_picture(self) -> Path:
        """Coverage, QD score and best scores over the generations."""
        return self.path / "curves.png"

    @property
    def summary_file(self) -> Path:
        """The run's result."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Folder of the best model found, in Hugging Face layout."""
        return self.path / "best"

    @property
    def aggregate(self) -> Path:
        """Folder of the merge of every archive's best model, in Hugging Face layout."""
        return self.path / "aggregate"


def _refuse_foreign(path: Path) -> None:
    """Refuses a file, and a folder of other things, before anything is written there."""
    if path.exists() and not path.is_dir():
        raise RunFolderError(
            f"{path}: expected a folder for the run, found a file; name another path"
        )
    if not path.exists() or (path / "config.json").exists():
        return
    # What a run leaves behind that was killed before its config was written is no stranger.
    strangers = sorted(
        p.name for p in path.iterdir() if not p.name.startswith((".lock", ".config"))
    )
    if strangers:
        shown = ", ".join(strangers[:5]) + (", …" if len(strangers) > 5 else "")
        raise RunFolderError(
            f"{path}: expected a new folder or one with a config.json, found {shown}; "
            "nothing was changed, name another folder"
        )


def _create_and_lock(path: Path) -> int:
    """Creates the folder, takes its lock and returns the lock's file descriptor."""
    try:
        with explain_no_space(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except (FileExistsError, NotADirectoryError) as error:
        raise RunFolderError(f"{path}: a parent of it is a file; name another path") from error
    except (PermissionError, FileNotFoundError) as error:
        raise RunFolderError(
            f"{path}: cannot write there ({error.strerror}); name a folder you may write to"
        ) from error
    except OSError as error:
        if error.errno == errno.EROFS:
            raise RunFolderError(
                f"{path}: its file system is read-only; name another path"
            ) from error
        raise
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(lock)
        raise RunFolderError(
            f"{path}: in use by {owner}; wait for it, end it, or name another folder"
        ) from error
    os.ftruncate(lock, 0)
    with contextlib.suppress(OSError):  # a courtesy: on a full disk the lock holds without it
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return lock


def _unlock(lock: int) -> None:
    # Explicitly: a forked child that still holds the descriptor must not keep the folder locked.
    fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def _claim(path: Path, wanted: Mapping[str, Any]) -> bool:
    """Writes the config into a fresh folder or compares it with the one found; True: resumed."""
    config_file = path / "config.json"
    if config_file.exists():
        try:
            found = read_json(config_file)
        except ValueError as error:
            raise RunFolderError(f"{error}; restore the file or name another folder") from error
        differing = differing_keys(found, wanted)
        if differing:
            raise RunFolderError(
                f"{path} holds a run with another config:\n"
                + "".join(f"  {line}\n" for line in differing)
                + f"Nothing was changed. Name another folder, use the settings of {config_file}, "
                "or remove the folder to start over"
            )
        return True
    write_json_atomic(config_file, wanted, sort_keys=True)
    return False


def differing_keys(found: Any, wanted: Any) -> list[str]:
    """A line for every setting that differs (``training.steps: expected 200, found 100``)."""
    flat_found, flat_wanted = dict(_flatten(found)), dict(_flatten(wanted))
    lines = []
    for key in sorted(flat_found.keys() | flat_wanted.keys()):
        expected, actual = flat_wanted.get(key, _ABSENT), flat_found.get(key, _ABSENT)
        if repr(expected) != repr(actual):  # repr: NaN equals NaN, 1 differs from 1.0 and from True
            lines.append(f"{key}: expected {_show(expected)}, found {_show(actual)}")
    return lines


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and (value or not prefix):
        return [
            pair
            for key, item in value.items()
            for pair in _flatten(item, f"{prefix}.{key}" if prefix else key)
        ]
    return [(prefix or "config", value)]


def _show(value: Any) -> str:
    return "nothing" if value is _ABSENT else repr(value)
