"""Files that are whole or untouched, and clear words on a full disk."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)


class NoSpaceError(OSError):
    """The file system is full (or over quota); the message names the file and the bytes left."""


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

    On any error the old file stays as it was and the temporary one is removed. Several writers, in
    threads, processes or on hosts that share the folder, do not meet: the last one's file stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
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
