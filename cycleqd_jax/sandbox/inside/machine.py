"""One private machine: its namespaces, its first process, and what is asked of it.

The supervisor is outside of the process namespace that it watches: nothing in there can see, stop
or kill it. Its children are the first process, which reaps orphans and whose end is the end of all
others, the agent's shell on a terminal, and scripts beside it.
"""

import contextlib
import fcntl
import os
import resource
import select
import signal
import socket
import struct
import termios
import time
from typing import Any, NoReturn

from . import filter as seccomp
from . import identity, kernel, memory, wire
from .turn import Turns

# As Docker's containers, but for raw sockets and device files.
_CAPABILITIES = (0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 29, 31)
_FAMILIES = (1, 2, 10, 16)  # local, IPv4, IPv6, netlink
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_HIDDEN = ("acpi", "asound", "bus", "driver", "fs", "irq", "latency_stats", "scsi", "tty")
_UNREADABLE = ("kcore", "keys", "kmsg", "sched_debug", "timer_list", "kallsyms", "sysrq-trigger",
               "pagetypeinfo", "slabinfo", "vmallocinfo", "kpagecount", "kpageflags",
               "kpagecgroup", "mtrr", "sysvipc", "config.gz")  # fmt: skip
_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
          "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx"}  # fmt: skip
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOSTNAME": "machine",
    "HOME": "/root",
}
_SHELL = ["bash", "--login"]
_LONGEST_LINE = 4000  # bytes; a terminal that hands out line by line cuts them at 4096
_TICK, _IDLE_TICK = 0.05, 0.25
_START_SECONDS = 20.0
_MAX_FDS = 1024


class LimitReached(Exception):  # noqa: N818
    """The machine has to be ended; the message says why."""


class Machine:
    """The supervisor of one machine."""

    def __init__(self, channel: int, limits: dict[str, int], users: bool) -> None:
        self._channel = channel
        self._limits = limits
        self._users = users
        self._proc = -1
        self._terminal = -1
        self._shell = 0
        self._next_look = 0.0
        self._seen = bytearray()
        self._unsent = b""
        self._turns = Turns()

    def live(self, base: str, scratch: str, root: str) -> NoReturn:
        """Set up, then answer requests until the other end is closed.

        base: the common system, read and never written. scratch, root: where to mount.
        """
        namespaces = (
            kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET
            | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWUSER
        )  # fmt: skip
        if not identity.beside(lambda: kernel.unshare(namespaces), identity.pass_on):
            raise OSError("the users of a machine could not be set")
        identity.become_root(self._users)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        kernel.sethostname("machine")
        self._mount(base, scratch, root)
        self._first_process(root)
        self._raise_loopback()
        self._start_shell()
        # An empty turn: from here on the shell does not prompt.
        self._take_turn("", time.monotonic() + _START_SECONDS)
        self._send({"ready": True})
        while True:
            ready, _, _ = select.select([self._channel], [], [], _IDLE_TICK)
            self._look()
            if ready:
                request = wire.read_message(self._channel)
                if request is None:
                    os._exit(0)
                self._answer(request)

    def _answer(self, request: dict[str, Any]) -> None:
        deadline = time.monotonic() + request["seconds"]
        try:
            if "type" in request:
                self._send(self._take_turn(request["type"], deadline))
            else:
                self._send(self._run(request["run"], deadline))
        except LimitReached as limit:
            self._lose(str(limit))

    def _take_turn(self, command: str, deadline: float) -> dict[str, Any]:
        """Type a command and watch the terminal until it is done, or time is up."""
        if self._shell_ended():
            return {"output": "", "state": "closed"}
        self._set_terminal(command)
        self._unsent += self._turns.type(command)
        while True:
            length = self._turns.length(self._seen)
            state = "done"
            if length < 0:
                state = self._exchange(deadline)
                if state == "more":
                    continue
                length = len(self._seen)
            output = self._turns.show(self._seen[:length])
            self._seen.clear()
            return {"output": output, "state": state}

    def _exchange(self, deadline: float) -> str:
        """Type what the terminal takes, read what it shows."""
        now = time.monotonic()
        if now >= deadline:
            return "late"
        writing = [self._terminal] if self._unsent else []
        readable, writable, _ = select.select([self._terminal], writing, [], _TICK)
        self._look()
        if writable:
            # A little at a time: what a terminal has no room for, it may drop.
            self._unsent = self._unsent[_type(self._terminal, self._unsent[:1024]) :]
        if readable:
            piece = _read(self._terminal)
            self._seen += piece or b""
            if len(self._seen) > self._limits["output_bytes"]:
                raise LimitReached("output limit")
            if piece == b"":
                return "closed"
        elif self._shell_ended():
            return "closed"
        return "more"

    def _run(self, command: list[str], deadline: float) -> dict[str, Any]:
        """Run a command beside the shell, as `docker exec` does."""
        out, out_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        pid = self._spawn(command, stdout=out_end)
        os.close(out_end)
        ended = os.pidfd_open(pid)
        output, watched, late, done = bytearray(), [out, ended], False, False
        try:
            # Its end counts, not the pipe's: what it left running may hold on to that.
            while not done:
                ready, _, _ = select.select(watched, [], [], _TICK)
                self._look()
                done = ended in ready
                while piece := _read(out):
                    output += piece
                    if len(output) > self._limits["output_bytes"]:
                        raise LimitReached("output limit")
                if piece == b"" and out in watched:
                    watched.remove(out)
                if not late and time.monotonic() >= deadline:
                    late = True
                    _kill_group(pid)
        finally:
            os.close(out)
            os.close(ended)
        _, status = os.waitpid(pid, 0)
        return {
            "code": None if late else os.waitstatus_to_exitcode(status),
            "output": output.decode("utf-8", "replace"),
        }

    def _spawn(
        self, command: list[str], stdout: int = -1, stdin: int = -1, terminal: bool = False
    ) -> int:
        """Start a program as the machine's root; its number in the supervisor's namespace."""
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            environment = dict(_ENVIRONMENT)
            if terminal:
                environment["TERM"] = "dumb"
                fcntl.ioctl(stdin, termios.TIOCSCTTY, 0)
            nothing = os.open("/dev/null", os.O_RDWR)
            for number, fd in enumerate((stdin, stdout, stdin if terminal else nothing)):
                os.dup2(fd if fd >= 0 else nothing, number)
            os.closerange(3, _MAX_FDS)
            self._confine()
            os.execvpe(command[0], command, environment)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode("utf-8", "replace"))
        finally:
            os._exit(126)

    def _confine(self) -> None:
        """What no program of the machine can undo, although it is root there."""
        processes = self._limits["processes"]
        for name, value in (
            (resource.RLIMIT_NPROC, processes + 8),  # the supervisor's own limit comes first
            (resource.RLIMIT_AS, self._limits["memory_bytes"]),
            (resource.RLIMIT_FSIZE, self._limits["disk_bytes"]),
            (resource.RLIMIT_NOFILE, _MAX_FDS),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):
            resource.setrlimit(name, (value, value))
        # Python ignores these two; programs expect to die of them.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        kernel.keep_capabilities(_CAPABILITIES)
        seccomp.install(_FAMILIES)
        os.umask(0o022)

    def _mount(self, base: str, scratch: str, root: str) -> None:
        """The common system below, everything that is written in memory above it."""
        own, nodev = f"size={self._limits['disk_bytes']},nr_inodes=16384,mode=755", kernel.MS_NODEV
        kernel.mount("tmpfs", scratch, "tmpfs", nodev, own)
        for name in ("up", "work"):
            os.mkdir(f"{scratch}/{name}")
        # Relative names: the list of mounts is read inside.
        os.chdir(os.path.dirname(base))
        layers = (os.path.basename(base), os.path.basename(scratch))
        options = "lowerdir={0},upperdir={1}/up,workdir={1}/work".format(*layers)
        try:
            kernel.mount("overlay", root, "overlay", nodev, options + ",userxattr")
        except OSError:
            # Before Linux 6.6 a tmpfs had no place for the marks that replace a folder.
            kernel.mount("overlay", root, "overlay", nodev, options)
        for name in _DEVICES:
            open(f"{root}/dev/{name}", "w").close()
            kernel.mount(f"/dev/{name}", f"{root}/dev/{name}", flags=kernel.MS_BIND)
        for name, target in _LINKS.items():
            os.symlink(target, f"{root}/dev/{name}")
        os.mkdir(f"{root}/dev/shm", 0o1777)
        os.chmod(f"{root}/dev/shm", 0o1777)
        os.mkdir(f"{root}/dev/pts")
        pts = "newinstance,ptmxmode=0666,mode=620" + (",gid=5" if self._users else "")
        kernel.mount("devpts", f"{root}/dev/pts", "devpts", kernel.MS_NOSUID, pts)

    def _first_process(self, root: str) -> None:
        """Process 1: a shell that waits for ever, with the view that everybody shares."""
        waits_on, held_open = os.pipe()
        mounted, says = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
                kernel.mount("proc", f"{root}/proc", "proc", flags)
                os.write(says, b".")
                os.close(says)
                os.close(mounted)
                os.close(held_open)
                os.read(waits_on, 1)
                os.dup2(waits_on, 0)
                nothing = os.open("/dev/null", os.O_RDWR)
                os.dup2(nothing, 1)
                os.dup2(nothing, 2)
                os.closerange(3, _MAX_FDS)
                os.setsid()
                self._confine()
                kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
                os.execve("/bin/bash", ["bash"], _ENVIRONMENT)
            finally:
                os._exit(1)
        os.close(says)
        os.close(waits_on)
        if not os.read(mounted, 1):
            raise OSError("no /proc could be mounted")
        os.close(mounted)
        with open(f"{root}/proc/sys/user/max_user_namespaces", "w", encoding="utf-8") as file:
            file.write("0")
        self._hide(root)
        os.chdir(root)
        kernel.pivot_root(".", ".")
        kernel.detach(".")
        os.chdir("/")
        self._proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        os.set_inheritable(held_open, False)
        os.write(held_open, b"\n")

    def _hide(self, root: str) -> None:
        proc = f"{root}/proc"
        for name in _HIDDEN:
            if os.path.isdir(f"{proc}/{name}"):
                flags = kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
                kernel.mount("tmpfs", f"{proc}/{name}", "tmpfs", flags, "size=4k,mode=555")
        for name in _UNREADABLE:
            if os.path.isfile(f"{proc}/{name}"):
                kernel.mount(f"{root}/dev/null", f"{proc}/{name}", flags=kernel.MS_BIND)
        kernel.mount(f"{proc}/sys", f"{proc}/sys", flags=kernel.MS_BIND | kernel.MS_REC)
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC | kernel.MS_RDONLY
        kernel.mount("", f"{proc}/sys", flags=flags | kernel.MS_REMOUNT | kernel.MS_BIND)

    def _raise_loopback(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            up = struct.pack("16sh14x", b"lo", 1)
            fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS, IFF_UP

    def _start_shell(self) -> None:
        self._terminal, line = os.openpty()
        os.set_blocking(self._terminal, False)
        self._set_terminal("")
        self._shell = self._spawn(_SHELL, stdin=line, stdout=line, terminal=True)
        os.close(line)

    def _set_terminal(self, command: str) -> None:
        """No echo and no keys; lines are handed out one by one, so that `su` can have the next."""
        mode = termios.tcgetattr(self._terminal)
        lines = max(map(len, command.encode("utf-8", "replace").split(b"\n"))) < _LONGEST_LINE
        mode[0] = mode[1] = 0
        mode[3] = termios.ICANON if lines else 0
        mode[6] = [b"\0"] * len(mode[6])
        if not lines:
            mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._terminal, termios.TCSANOW, mode)

    def _shell_ended(self) -> bool:
        if self._shell and os.waitpid(self._shell, os.WNOHANG)[0]:
            self._shell = 0
        return self._shell == 0

    def _look(self) -> None:
        """Enforce the limits that the kernel does not."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _TICK
        most = self._limits["memory_bytes"]
        processes, used = memory.usage(self._proc, 0, most)
        if processes == 0:
            self._lose("its first process ended")
        elif used > most:
            self._lose("memory limit")
        elif processes > self._limits["processes"]:
            self._lose("process limit")

    def _lose(self, reason: str) -> NoReturn:
        self._send({"lost": reason})
        os._exit(0)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            wire.write_all(self._channel, wire.pack_message(message))
        except OSError:
            os._exit(0)  # nobody listens any more


def _read(fd: int) -> bytes | None:
    """What is there: None for nothing yet, b"" for nothing ever again."""
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return None
    except OSError:
        return b""  # no program has the terminal any more


def _type(fd: int, data: bytes) -> int:
    try:
        return os.write(fd, data)
    except BlockingIOError:
        return 0


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
