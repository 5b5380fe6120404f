"""Model folders as a whole: their JSON files, and a folder that is replaced or left untouched."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError where the file is missing or holds no object."""
    if not path.is_file():
        raise ValueError(f"{path.parent}: expected the file {path.name}, found none")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replaced_folder(folder: Path, size: int) -> Iterator[Path]:
    """A draft folder next to `folder` that takes its place on success and vanishes on failure.

    Raises OSError, with a plain message, where less than `size` bytes are free or the disk fills.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < size:
        raise OSError(errno.ENOSPC, _full(size, free), str(folder))
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield draft
        draft.chmod(0o777 & ~_umask())
        if folder.exists():
            old = draft.with_name(draft.name + ".old")
            folder.rename(old)
            try:
                draft.rename(folder)
            except OSError:
                old.rename(folder)
                raise
            shutil.rmtree(old)
        else:
            draft.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(folder.parent).free
            raise OSError(errno.ENOSPC, _full(size, free), str(folder)) from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _full(size: int, free: int) -> str:
    return (
        f"no space left to save the model: expected {size / 1e6:.1f} MB free, "
        f"found {free / 1e6:.1f} MB; free some or choose another folder"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
