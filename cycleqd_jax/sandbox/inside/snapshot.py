"""The regular files of a dead program's directory, without ever following a link."""

import os
import stat

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAX_DEPTH = 50


class TooLarge(Exception):  # noqa: N818
    """More text or deeper folders than a snapshot may hold."""


def read_tree(folder: int, max_bytes: int) -> dict[str, str]:
    """Relative path -> text, "path/" -> "" for folders; names in sorted order.

    Raises TooLarge beyond `max_bytes` of names and text together.
    """
    files: dict[str, str] = {}
    left = max_bytes
    pending = [""]
    # The program may have shut its own directory; nothing in it can then be opened by name.
    os.fchmod(folder, 0o700)
    while pending:
        prefix = pending.pop()
        if prefix.count("/") > _MAX_DEPTH:
            raise TooLarge("directories too deep")
        here = _open(folder, prefix or ".", os.O_DIRECTORY)
        try:
            os.fchmod(here, 0o700)
            for name in sorted(os.listdir(here)):
                mode = os.lstat(name, dir_fd=here).st_mode
                path = prefix + name
                shown = path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                left -= len(shown)
                if stat.S_ISDIR(mode):
                    files[shown + "/"] = ""
                    pending.append(path + "/")
                elif stat.S_ISREG(mode):
                    data = _read(here, name, left)
                    left -= len(data)
                    files[shown] = data.decode("utf-8", "replace")
                if left < 0:
                    raise TooLarge("too much text in the working directory")
        finally:
            os.close(here)
    return dict(sorted(files.items()))


def _open(folder: int, name: str, extra: int = 0) -> int:
    try:
        return os.open(name, _FLAGS | extra, dir_fd=folder)
    except PermissionError:
        # The program took away its own right to read; nobody is left to race with.
        os.chmod(name, 0o700, dir_fd=folder)
        return os.open(name, _FLAGS | extra, dir_fd=folder)


def _read(folder: int, name: str, most: int) -> bytes:
    fd = _open(folder, name)
    try:
        pieces = []
        while most >= 0 and (piece := os.read(fd, min(most + 1, 1 << 20))):
            pieces.append(piece)
            most -= len(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)
