"""A small system made of this machine's own programs: what every private machine starts from.

Programs are copied with the libraries they load, everything else is written anew. Whoever builds
it owns it, so that it belongs to root inside; nothing of /home, /root, /var or /etc is taken, and
nothing that the builder may not read.
"""

import fnmatch
import glob
import os
import shutil
import subprocess
from collections.abc import Iterable

from .names import ETC, FOLDERS, NEEDED, PROGRAMS, SHARED, STDLIB_LEFT_OUT

_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_PAM_FOLDERS = ("/lib/*/security", "/usr/lib/*/security", "/usr/lib64/security", "/lib/security")
# The loader lists what a program would load; of plugins, what a program with all of them would.
_TRACE = 'export LD_TRACE_LOADED_OBJECTS=1; LD_PRELOAD=$0 /bin/true; for f in "$@"; do "$f"; done'
_TOP_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


class ImageIncomplete(Exception):  # noqa: N818
    """Programs are lacking without which there is no system; the message names them."""


def build(root: str) -> list[str]:
    """Fill an empty folder; the programs that this machine lacks are returned.

    Raises ImageIncomplete.
    """
    places = {name: _find(name) for name in PROGRAMS}
    missing = [name for name, place in places.items() if place is None]
    if lacking := sorted(NEEDED.intersection(missing)):
        raise ImageIncomplete(f"not found in {':'.join(_PATH)}: {', '.join(lacking)}")
    for folder, mode in FOLDERS.items():
        os.makedirs(root + folder, exist_ok=True)
        os.chmod(root + folder, mode)
    copy = _Copy(root)
    for name in _TOP_LINKS:
        if os.path.islink("/" + name):
            copy.take("/" + name)
        elif os.path.isdir("/" + name):
            os.makedirs(f"{root}/{name}", exist_ok=True)
    for place in filter(None, places.values()):
        copy.take(place)
    python = places["python3"]
    assert python is not None
    copy.tree(_stdlib(python), STDLIB_LEFT_OUT)
    for pattern in (*SHARED, *(f"{folder}/pam_*.so" for folder in _PAM_FOLDERS)):
        for path in sorted(glob.glob(pattern)):
            copy.tree(path, ())
    copy.libraries()
    for path, (mode, text) in ETC.items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        with open(root + path, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(root + path, mode)
    for path in ("/etc/ld.so.cache", "/etc/os-release"):
        if os.path.exists(path):
            copy.take(path)
    return missing


class _Copy:
    """Files at the places they have here, each once."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._taken: set[str] = set()
        self._programs: list[str] = []

    def take(self, path: str) -> None:
        """A file, and whatever links lead to it."""
        folder, name = os.path.split(path)
        path = os.path.join(self._folder(folder), name)
        if path in self._taken:
            return
        self._taken.add(path)
        if os.path.islink(path):
            target = os.readlink(path)
            if not os.path.lexists(self._root + path):
                os.symlink(target, self._root + path)
            self.take(os.path.normpath(os.path.join(os.path.dirname(path), target)))
        elif os.path.isfile(path):
            try:
                shutil.copy2(path, self._root + path)
            except PermissionError:
                return
            self._note_program(path)

    def tree(self, path: str, left_out: Iterable[str]) -> None:
        """A file or a folder, without entries of these names."""
        if not os.path.isdir(path):
            self.take(path)
            return
        unwanted = tuple(left_out)
        for folder, folders, files in os.walk(path):
            folders[:] = [name for name in folders if not _is_any(name, unwanted)]
            self._folder(folder)
            for name in files:
                if not _is_any(name, unwanted):
                    self.take(f"{folder}/{name}")

    def libraries(self) -> None:
        """What the programs taken so far load, as the loader itself says."""
        plugins = [path for path in self._programs if ".so" in os.path.basename(path)]
        programs = [path for path in self._programs if path not in set(plugins)]
        command = ["/bin/bash", "-c", _TRACE, " ".join(plugins), *programs]
        listed = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
        for line in listed.stdout.decode("utf-8", "replace").splitlines():
            for word in line.split():
                if word.startswith("/") and ".so" in word:
                    self.take(word)

    def _note_program(self, path: str) -> None:
        with open(path, "rb") as file:
            if file.read(4) == b"\x7fELF":
                self._programs.append(path)

    def _folder(self, folder: str) -> str:
        """The folder without links on the way; it exists in the copy, and so do the links."""
        real = os.path.realpath(folder)
        if not os.path.isdir(self._root + real):
            os.makedirs(self._root + real, exist_ok=True)
        return real


def _find(program: str) -> str | None:
    places = (f"{folder}/{program}" for folder in _PATH)
    return next((place for place in places if os.access(place, os.X_OK)), None)


def _stdlib(python: str) -> str:
    code = "import sysconfig; print(sysconfig.get_path('stdlib'))"
    found = subprocess.run(
        [python, "-I", "-S", "-c", code], capture_output=True, check=True, stdin=subprocess.DEVNULL
    )
    return found.stdout.decode().strip()


def _is_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
