"""The folder of one run: where everything lies, whose run it is, and who may write to it now."""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cycleqd_jax.atomic import explain_no_space
from cycleqd_jax.runs.records.files import from_json, read_json, to_json, write_json_atomic

FORMAT = 2
"""Of a run folder: raise it when files mean something else than before. A config.json without a
format is of version 0.1's first runs, 1: their logs hold no recipes and their checkpoints more than
elites."""

_ABSENT = object()


class RunFolderError(ValueError):
    """The folder cannot serve this run; the message says why and what to do. Nothing is lost."""


class RunFiles:
    """Where the parts of a run lie in its folder.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def config_file(self) -> Path:
        """The settings the run was started with."""
        return self.path / "config.json"

    @property
    def parents_file(self) -> Path:
        """Digests of the models the run began with."""
        return self.path / "parents.json"

    @property
    def finals_file(self) -> Path:
        """The models that were put forward, and why."""
        return self.path / "finals.json"

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


class RunFolder(RunFiles):
    """An opened run folder, locked against a second process until `close` (or the process ends).

    Layout: ``config.json``, ``parents.json``, ``compatibility.json``, ``metrics.jsonl``,
    ``lineage.jsonl``, ``finals.json``, ``archives.png``, ``curves.png``, ``summary.json``,
    ``checkpoints/``, ``best/``, ``aggregate/``.

    Attributes:
        path: the folder.
        config: the run's settings as they read back from JSON.
        resumed: True if the folder already held a run of the same settings.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], resumed: bool, lock: int):
        super().__init__(path)
        self.config = config
        self.resumed = resumed
        self._lock: int | None = lock

    @classmethod
    def open(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> "RunFolder":
        """Creates the folder and writes its config, or takes up the run of equal config there.

        Raises:
            RunFolderError: if the path is a file, is not writable, is in use by another process,
                holds other files but no run, or holds a run of another config or of another
                version of the library.
            NoSpaceError: if the disk is full.
        """
        path = Path(path)
        wanted = from_json(to_json(config, "config"))
        _refuse_foreign(path)
        lock = _create_and_lock(path)
        try:
            resumed = _claim(path, wanted)
            _clear_drafts(path)
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
        found = read_config(path)
        differing = differing_keys(found, wanted)
        if differing:
            raise RunFolderError(
                f"{path} holds a run with another config:\n"
                + "".join(f"  {line}\n" for line in differing)
                + f"Nothing was changed. Name another folder, use the settings of {config_file}, "
                "or remove the folder to start over"
            )
        return True
    write_json_atomic(config_file, {"format": FORMAT, **wanted}, sort_keys=True)
    return False


def read_config(path: Path) -> dict[str, Any]:
    """The settings of the run in a folder, whoever works in it.

    Raises:
        RunFolderError: there is no run, its config is damaged, or it was written by another version
            of the library.
    """
    config_file = path / "config.json"
    if not config_file.is_file():
        raise RunFolderError(f"{path}: expected the folder of a run, found no config.json")
    try:
        found = read_json(config_file)
    except ValueError as error:
        raise RunFolderError(f"{error}; restore the file or name another folder") from error
    if not isinstance(found, dict):
        raise RunFolderError(f"{config_file}: expected a JSON object; restore the file")
    return check_format(path, found)


def check_format(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a run's config, without its format.

    Raises:
        RunFolderError: another version of the library wrote them.
    """
    found = dict(config)
    version = found.pop("format", 1)
    if version != FORMAT:
        age = "an older" if isinstance(version, int) and version < FORMAT else "a newer"
        raise RunFolderError(
            f"{path}: a run of {age} version of cycleqd_jax: expected the format {FORMAT}, found "
            f"{version}. Nothing was changed; use the version that began it, or another folder"
        )
    return found


def _clear_drafts(path: Path) -> None:
    """Removes what a killed process was writing; the names are those of drafts only."""
    for draft in path.glob(".*"):
        if draft.is_dir() and draft.name.startswith((".best.", ".aggregate.")):
            shutil.rmtree(draft, ignore_errors=True)
        elif draft.name.endswith(".tmp"):
            draft.unlink(missing_ok=True)


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
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [
            pair
            for number, item in enumerate(value)
            for pair in _flatten(item, f"{prefix}[{number}]")
        ]
    return [(prefix or "config", value)]


def _show(value: Any) -> str:
    return "nothing" if value is _ABSENT else repr(value)
