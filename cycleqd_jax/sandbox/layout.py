"""What of the machine a program may see, and the environment it runs in."""

import os
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

HOME = "/home/user"
_TOP = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
# Read, /dev/full gives zeros too; mapped, /dev/zero would give memory that no limit counts.
_DEVICES = {
    "null": "null",
    "zero": "full",
    "full": "full",
    "random": "random",
    "urandom": "urandom",
}


@dataclass(frozen=True)
class Layout:
    """A root file system in the making.

    python: the interpreter, resolved.
    binds: (source on the machine, place in the root), all read-only.
    links: (target, path) of symbolic links.
    files: path -> text of small files written afresh.
    """

    python: str
    binds: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, str], ...]

    def as_json(self) -> dict[str, object]:
        """The fields as plain lists and strings."""
        return asdict(self)


def machine_layout() -> Layout:
    """/usr, the interpreter's prefix, five devices and next to nothing of /etc."""
    binds = [("/usr", "/usr")]
    links = [("/home/tmp", "/tmp"), ("/home/tmp", "/dev/shm"), ("/proc/self/fd", "/dev/fd")]
    links += [(f"/proc/self/fd/{n}", f"/dev/{s}") for n, s in enumerate(("stdin", "stdout"))]
    links += [("/proc/self/fd/2", "/dev/stderr")]
    for name in _TOP:
        path = Path("/", name)
        if path.is_symlink():
            links.append((os.readlink(path), str(path)))
        elif path.is_dir():
            binds.append((str(path), str(path)))
    for source in _python_folders():
        if not any(Path(source).is_relative_to(place) for _, place in binds):
            binds.append((source, source))
    binds += [(f"/dev/{source}", f"/dev/{name}") for name, source in _DEVICES.items()]
    alternatives = Path("/etc/alternatives")
    if alternatives.is_dir():
        links += [(os.readlink(p), str(p)) for p in alternatives.iterdir() if p.is_symlink()]
    if Path("/etc/ld.so.cache").is_file():
        binds.append(("/etc/ld.so.cache", "/etc/ld.so.cache"))
    files = (
        ("/etc/passwd", f"user:x:1000:1000::{HOME}:/bin/bash\n"),
        ("/etc/group", "user:x:1000:\n"),
        ("/etc/hosts", "127.0.0.1 localhost\n"),
        ("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"),
    )
    return Layout(_interpreter(), tuple(binds), tuple(links), files)


def clean_environment(layout: Layout) -> dict[str, str]:
    """The whole environment of a program; nothing is inherited."""
    prefix = Path(layout.python).parent
    environment = {
        "HOME": HOME,
        "PWD": HOME,
        "USER": "user",
        "LOGNAME": "user",
        "SHELL": "/bin/bash",
        "TERM": "dumb",
        "TMPDIR": "/tmp",
        "PATH": f"/usr/local/bin:/usr/bin:/bin:{prefix}",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if sysconfig.get_config_var("Py_ENABLE_SHARED") and prefix != Path("/usr/bin"):
        environment["LD_LIBRARY_PATH"] = str(prefix.parent / "lib")
    return environment


def _interpreter() -> str:
    # A virtual environment's python is a link to the one that holds the standard library.
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _python_folders() -> list[str]:
    # Only bin and lib of the prefixes: a prefix can be as wide as a home directory.
    folders = [os.path.dirname(_interpreter())]
    for prefix in {sys.base_prefix, sys.base_exec_prefix}:
        folders += [os.path.realpath(os.path.join(prefix, name)) for name in ("lib", "lib64")]
    return [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]
