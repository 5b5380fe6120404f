"""Files that are whole or untouched: atomic writes, JSON of run data, clear words on a full disk.

JSON has no NaN and no infinity. Run data may hold both (a score that is not finite is recorded),
so they are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which `from_json`
turns back into floats. A real string with one of these spellings is refused on writing.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_FULL = (errno.ENOSPC, errno.EDQUOT)


class NoSpaceError(OSError):
    """The file system is full (or over quota); the message names the file and the bytes left."""


def to_json(value: Any, where: str = "value") -> Any:
    """The value in plain JSON types: arrays as lists, paths and non-finite floats as strings.

    Raises:
        ValueError: for a type JSON cannot hold, a key that is no string, or a string spelled like
            an encoded non-finite float; the message names the entry.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # NumPy and JAX arrays and scalars
        value = np.asarray(value).tolist()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _spell(value)
    if isinstance(value, str):
        if value in _NON_FINITE:
            raise ValueError(
                f"{where}: the string {value!r} is reserved for the float of that name"
            )
        return value
    if isinstance(value, Mapping):
        return {_key(k, where): to_json(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(
        f"{where}: expected numbers, strings, lists, mappings or arrays, "
        f"found {type(value).__name__}"
    )


def from_json(value: Any) -> Any:
    """The inverse of `to_json` on what JSON gives back (lists stay lists)."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        return {k: from_json(v) for k, v in value.items()}
    return value


def _spell(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{where}: expected string keys, found {key!r} ({type(key).__name__})")
    return key


@contextmanager
def explain_no_space(path: Path) -> Iterator[None]:
    """Turns a full disk met inside the block into a `NoSpaceError` with `path` and free bytes."""
    try:
        yield
    except Exception as error:
        if isinstance(error, NoSpaceError) or not _is_no_space(error):
            raise
        raise NoSpaceError(
            errno.ENOSPC,
            f"no space left while writing {path}: {_free_bytes(path):,} bytes are free there. "
            "What was written before is untouched; make room and start the same command again",
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed over `path`.

    On any error the old file stays as it was and the temporary one is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explain_no_space(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Writes the text (UTF-8) so that a reader sees the old file or the new one, never a part."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: Path, data: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    """Writes the mapping as indented JSON, atomically; non-finite floats as described above."""
    plain = to_json(data, path.name)
    text = json.dumps(plain, indent=2, sort_keys=sort_keys, allow_nan=False, ensure_ascii=False)
    write_text_atomic(path, text + "\n")


def read_json(path: Path) -> Any:
    """Reads what `write_json_atomic` wrote.

    Raises:
        ValueError: if the file is not JSON; the message names it.
    """
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found something else ({error})") from error


def _is_no_space(error: BaseException | None) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True  # storage libraries report it as text
        if isinstance(error, BaseExceptionGroup) and any(map(_is_no_space, error.exceptions)):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _free_bytes(path: Path) -> int:
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free
