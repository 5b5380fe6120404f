"""From the launcher's namespaces to the bare root in which programs live."""

import os
import re
from pathlib import Path
from typing import Any

from . import kernel

NOBODY = 65534
_FLAGS = {
    "ro": kernel.MS_RDONLY,
    "nosuid": kernel.MS_NOSUID,
    "nodev": kernel.MS_NODEV,
    "noexec": kernel.MS_NOEXEC,
    "noatime": kernel.MS_NOATIME,
    "nodiratime": kernel.MS_NODIRATIME,
    "relatime": kernel.MS_RELATIME,
}


def enter(layout: dict[str, Any]) -> int:
    """Swap the root for the layout, give up root's identity; a descriptor of /proc is returned.

    Raises OSError when the kernel refuses a step.
    """
    if not _may_mount():
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        become_root = kernel.MapUser(proc, 0)
        kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS)
        become_root()
        os.close(proc)
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.sethostname("sandbox")
    _build(layout)
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    if _is_real_root():
        # The kernel never counts the processes of the true root: be somebody else.
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
    return proc


def _may_mount() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) & (1 << 21))
    return False


def _is_real_root() -> bool:
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return os.geteuid() == 0 and any(
        int(first) <= NOBODY < int(first) + int(count) for first, _, count in ranges
    )


def _build(layout: dict[str, Any]) -> None:
    # Two roots on the way: the old one moves to /old, the new one is made in /new.
    kernel.mount("tmpfs", "/tmp", "tmpfs", options="mode=755")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    kernel.pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    kernel.mount("tmpfs", "/new", "tmpfs", kernel.MS_NOSUID, "mode=755,size=4m")
    for folder in ("dev", "etc", "home", "proc"):
        os.mkdir(f"/new/{folder}")
    for source, place in layout["binds"]:
        _bind("/old" + source, "/new" + place)
    for target, path in layout["links"]:
        os.makedirs(os.path.dirname("/new" + path), exist_ok=True)
        os.symlink(target, "/new" + path)
    for path, text in layout["files"]:
        Path("/new" + path).write_text(text)
    for point, flags in _mounts("/new"):
        if point != "/new":
            kernel.mount("", point, flags=flags | _read_only(point))
    _mount_proc()
    kernel.mount("", "/new", flags=_read_only("/new"))
    os.chdir("/new")
    kernel.pivot_root(".", ".")
    kernel.detach(".")
    os.chdir("/")


def _mount_proc() -> None:
    # Programs mount their own over this one; the kernel lets them if this one hides nothing.
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    try:
        kernel.mount("proc", "/new/proc", "proc", flags)
    except PermissionError:
        # The launcher owns the process namespace: take the one it mounted.
        kernel.mount("/old/proc", "/new/proc", flags=kernel.MS_BIND | kernel.MS_REC)


def _bind(source: str, place: str) -> None:
    if os.path.isdir(source):
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        Path(place).touch()
    kernel.mount(source, place, flags=kernel.MS_BIND | kernel.MS_REC)


def _read_only(point: str) -> int:
    flags = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID
    return flags if point.startswith("/new/dev/") else flags | kernel.MS_NODEV


def _mounts(root: str) -> list[tuple[str, int]]:
    # Flags set by a more privileged owner must be repeated, or the kernel refuses a remount.
    found = []
    for line in Path("/old/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        if point == root or point.startswith(root + "/"):
            flags = 0
            for name in fields[5].split(","):
                flags |= _FLAGS.get(name, 0)
            found.append((point, flags))
    return found
