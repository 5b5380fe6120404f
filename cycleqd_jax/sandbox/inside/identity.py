"""Who is root inside: user namespaces and the users that they have.

Three cases. The true root takes 65 536 users that nobody on the machine is. An ordinary user takes
those that /etc/subuid gives, through `newuidmap`. Where neither is possible there is only root.
"""

import os
import pwd
import subprocess
from collections.abc import Callable

from . import kernel

Extents = list[tuple[int, int, int]]  # first inside, first outside, how many

# systemd's list of user numbers calls this stretch unused.
_FIRST, _COUNT = 0x70000000, 65536


def enter(flags: int) -> bool:
    """Enter new namespaces, a user namespace among them, as its root; True if it has more users.

    flags: of clone, for the other namespaces. Raises OSError.
    """
    outside = os.getuid(), os.getgid()
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        if beside(lambda: kernel.unshare(kernel.CLONE_NEWUSER | flags), _map_many):
            many = True
        else:
            many = False
            for name, text in (
                ("setgroups", b"deny"),
                ("uid_map", b"0 %d 1" % outside[0]),
                ("gid_map", b"0 %d 1" % outside[1]),
            ):
                _write(f"self/{name}", text, proc)
    finally:
        os.close(proc)
    become_root(many)
    return many


def become_root(many: bool) -> None:
    """Root of the user namespace that this process is in."""
    if many:
        os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    # Other processes of this user have to see it in /proc.
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)


def pass_on(pid: int) -> None:
    """Give a process that has just left for a user namespace all users of this one."""
    for kind in ("uid", "gid"):
        with open(f"/proc/self/{kind}_map", encoding="utf-8") as file:
            ranges = [line.split() for line in file]
        text = "".join(f"{first} {first} {count}\n" for first, _, count in ranges)
        if kind == "gid" and len(ranges) == 1 and ranges[0][2] == "1":
            _write(f"/proc/{pid}/setgroups", b"deny")
        _write(f"/proc/{pid}/{kind}_map", text.encode())


def beside(action: Callable[[], None], help_with: Callable[[int], None]) -> bool:
    """Do something while another process, forked before, stays behind to help afterwards.

    help_with: called there with this process's number. Returns whether it raised nothing.
    """
    me = os.getpid()
    ours, theirs = os.pipe()
    helper = os.fork()
    if helper == 0:
        try:
            os.close(theirs)
            if os.read(ours, 1):
                help_with(me)
                os._exit(0)
        except BaseException:
            os._exit(1)
        os._exit(2)
    os.close(ours)
    try:
        action()
        os.write(theirs, b".")
    finally:
        os.close(theirs)
        _, status = os.waitpid(helper, 0)
    return status == 0


def _map_many(pid: int) -> None:
    if os.geteuid() == 0:
        extent = 0, _free_users(), _COUNT
        for kind in ("uid", "gid"):
            _write(f"/proc/{pid}/{kind}_map", b"%d %d %d" % extent)
        return
    for kind, own in (("uid", os.getuid()), ("gid", os.getgid())):
        first, count = _subordinate(kind)
        program = [f"new{kind}map", str(pid), "0", str(own), "1", "1", str(first), str(count)]
        subprocess.run(program, check=True, stdin=subprocess.DEVNULL, capture_output=True)


def _free_users() -> int:
    """The first of the unused users, or of those a container has beyond its own."""
    with open("/proc/self/uid_map", encoding="utf-8") as file:
        ranges = [[int(word) for word in line.split()] for line in file]
    if any(first <= _FIRST and first + count >= _FIRST + _COUNT for first, _, count in ranges):
        return _FIRST
    first, _, count = max(ranges, key=lambda extent: extent[2])
    if first + count < 2 * _COUNT:
        raise OSError("no users to spare")
    return first + count - _COUNT


def _subordinate(kind: str) -> tuple[int, int]:
    names = {str(os.getuid()), pwd.getpwuid(os.getuid()).pw_name}
    with open(f"/etc/sub{kind}", encoding="utf-8") as file:
        for line in file:
            name, first, count = line.strip().split(":")
            if name in names:
                return int(first), min(int(count), _COUNT - 1)
    raise OSError(f"/etc/sub{kind} has no line for this user")


def _write(path: str, text: bytes, folder: int | None = None) -> None:
    fd = os.open(path, os.O_WRONLY, dir_fd=folder)
    try:
        os.write(fd, text)
    finally:
        os.close(fd)
