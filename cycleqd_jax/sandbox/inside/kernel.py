"""The few system calls that Python's standard library lacks."""

import ctypes
import functools
import os
import platform
from collections.abc import Iterable
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_PARENT = 0x00008000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
SIGCHLD = 17

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_NOATIME, MS_NODIRATIME = 32, 1024, 2048
MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME = 4096, 16384, 1 << 18, 1 << 21
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = (
    1, 4, 22, 24, 38,
)  # fmt: skip

# Numbers of clone and pivot_root; every processor but x86 shares the generic table.
_CLONE, _PIVOT_ROOT = (56, 155) if platform.machine() == "x86_64" else (220, 41)

# PyDLL keeps the interpreter lock, so that a raw clone finds it held in the child as well.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def clone(flags: int) -> int:
    """Fork with namespace flags: the child's process id, 0 in the child.

    Only for a process with one thread: Python's own bookkeeping after a fork is left out. It
    would touch some 200 pages, which doubles the cost, and seed `random` afresh.
    """
    pid = int(_libc.syscall(_CLONE, ctypes.c_ulong(flags | SIGCHLD), None, None, None, None))
    if pid < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"clone: {os.strerror(error)}")
    return pid


def unshare(flags: int) -> None:
    """Leave namespaces for new ones (os.unshare needs Python 3.12)."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """The mount system call; an empty string is passed as NULL."""
    result = _libc.mount(
        source.encode() or None,
        target.encode(),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    _checked(result, f"mount {source} {target} {kind}")


def pivot_root(new: str, old: str) -> None:
    """Make `new` the root and show the former one at `old`."""
    result = _libc.syscall(_PIVOT_ROOT, new.encode(), old.encode())
    _checked(result, "pivot_root")


def detach(target: str) -> None:
    """Unmount a tree even while something still uses it."""
    _checked(_libc.umount2(target.encode(), ctypes.c_int(MNT_DETACH)), f"umount {target}")


def sethostname(name: str) -> None:
    """Name this UTS namespace."""
    _checked(_libc.sethostname(name.encode(), ctypes.c_size_t(len(name))), "sethostname")


def prctl(option: int, value: int, pointer: object = None) -> None:
    """Prctl with one number and one pointer."""
    result = _libc.prctl(
        ctypes.c_int(option), ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)
    )
    _checked(result, f"prctl {option}")


def keep_capabilities(kept: Iterable[int]) -> None:
    """Leave this process and all it starts at most these capabilities, root or not."""
    kept = frozenset(kept)
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for number in range(last + 1):
        if number not in kept:
            prctl(PR_CAPBSET_DROP, number)
    header, mask = _CapHeader(0x20080522, 0), sum(1 << number for number in kept)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    _checked(_libc.capset(ctypes.byref(header), ctypes.byref(data)), "capset")


class Drop:
    """Empties the capability sets; built before a clone, called after it."""

    def __init__(self) -> None:
        header, empty = _CapHeader(0x20080522, 0), (ctypes.c_uint32 * 6)()
        self._keep = header, empty
        self._call = functools.partial(_libc.capset, ctypes.byref(header), ctypes.byref(empty))

    def __call__(self) -> None:
        """Nothing is left in the effective, permitted, inheritable and ambient sets."""
        _checked(self._call(), "capset")


class Mount:
    """A mount whose arguments are built before a clone and used after it."""

    def __init__(self, kind: str, target: str, flags: int, options: str = "") -> None:
        arguments = kind.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags)
        self._call = functools.partial(_libc.mount, *arguments, options.encode() or None)
        self._what = f"mount {kind} on {target}"

    def __call__(self) -> None:
        """Mount."""
        _checked(self._call(), self._what)


class MapUser:
    """In a fresh user namespace: be `inner`, which outside is the builder's user and group.

    proc: file descriptor of a /proc in which the caller can be seen.
    """

    def __init__(self, proc: int, inner: int) -> None:
        self._proc = proc
        self._lines = (
            ("self/setgroups", b"deny"),
            ("self/uid_map", b"%d %d 1" % (inner, os.geteuid())),
            ("self/gid_map", b"%d %d 1" % (inner, os.getegid())),
        )

    def __call__(self) -> None:
        """Write the three files."""
        for name, text in self._lines:
            fd = os.open(name, os.O_WRONLY, dir_fd=self._proc)
            os.write(fd, text)
            os.close(fd)


def _checked(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
