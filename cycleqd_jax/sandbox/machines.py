"""Private machines: a small Linux of its own for every episode of an agent that acts in a shell.

Inside, the agent is root of a system in memory, with its own processes, users, network (loopback
only) and files; outside nothing changes. A machine is a few namespaces forked from one `Hall`
process that holds the common system, so that it starts in some milliseconds.
"""

import contextlib
import math
import select
import socket
import subprocess
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .base import SandboxBroken, SandboxUnavailable
from .complaints import Complaints
from .inside import wire
from .layout import clean_environment, machine_layout

_START_SECONDS = 60.0
_GRACE_SECONDS = 5.0
_ADVICE = (
    "Private machines need Linux 5.11 or newer with user namespaces: "
    "`sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000`, on Ubuntu 24.04 "
    "and later also `sysctl kernel.apparmor_restrict_unprivileged_userns=0`; a container needs "
    "`--privileged` (or `--security-opt seccomp=unconfined --security-opt systempaths=unconfined`)."
    " With a Docker engine, use that instead."
)


class MachineLost(RuntimeError):  # noqa: N818 (it is the agent's doing, and its problem fails)
    """A machine was ended because it reached a limit, or ended itself."""


@dataclass(frozen=True)
class MachineLimits:
    """What one machine may use; beyond it the machine is ended, but for a full disk.

    memory_mb: address space of each process, and resident memory of all together (looked at every
        50 ms).
    processes: alive at once, with the two that every machine has.
    disk_mb: everything that is written; a full disk is the agent's error to read.
    output_kb: of one command.

    Raises ValueError for a limit that is not positive.
    """

    memory_mb: int = 512
    processes: int = 64
    disk_mb: int = 64
    output_kb: int = 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"MachineLimits.{name}: expected a positive number, found {value}")


class Turn(NamedTuple):
    """What became of a command that was typed.

    state: "done"; "late" when it still ran after its time, and goes on; "closed" when the shell has
        ended.
    """

    output: str
    state: Literal["done", "late", "closed"]


class Ended(NamedTuple):
    """What became of a script: its exit code, None if it took too long, and what it printed."""

    code: int | None
    output: str


class Machine:
    """One machine; made by `Machines.boot`. For one thread at a time, but for `close`."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lost = ""

    def type(self, command: str, seconds: float) -> Turn:
        """Type a command in the agent's shell, whose state carries over.

        A command that was late stays in front: what is typed next is its input, or waits behind it.
        Raises MachineLost.
        """
        return Turn(**self._ask({"type": command, "seconds": seconds}, seconds))

    def run(self, command: list[str], seconds: float) -> Ended:
        """Run a program beside the shell: as root, in /, with its standard output returned.

        Raises MachineLost, ValueError for arguments that no program can be given.
        """
        if any("\0" in word for word in command):
            raise ValueError(f"expected arguments without NUL characters, found {command!r}")
        return Ended(**self._ask({"run": command, "seconds": seconds}, seconds))

    def close(self) -> None:
        """End the machine and all that runs there; safe to repeat, and from another thread."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        self._channel.close()

    def wait_until_ready(self) -> None:
        """The first message; MachineLost says what went wrong."""
        self._receive(_START_SECONDS)

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        if self._lost:
            raise MachineLost(self._lost)
        # A reason that it gave by itself is read as the answer.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._channel.sendall(wire.pack_message(request))
        return self._receive(seconds + _GRACE_SECONDS)

    def _receive(self, seconds: float) -> dict[str, Any]:
        data, deadline = bytearray(), time.monotonic() + seconds
        try:
            while (length := wire.message_length(data)) is None or len(data) < length:
                self._channel.settimeout(max(deadline - time.monotonic(), 0.001))
                piece = self._channel.recv(1 << 20)
                if not piece:
                    raise ConnectionResetError("it ended")
                data += piece
        except OSError as error:
            self._lost = str(error)
            raise MachineLost(f"no answer from the machine: {error}") from error
        message = wire.unpack_message(data)
        if "lost" in message:
            self._lost = message["lost"]
            raise MachineLost(self._lost)
        return message


class Machines:
    """Where machines start; the common system is built once, of this machine's own programs.

    users: whether there are users beside root. missing: programs the system would have had, had
    this machine had them.

    Raises SandboxUnavailable with what to do.
    """

    def __init__(self, limits: MachineLimits | None = None) -> None:
        self.limits = limits or MachineLimits()
        self._lock = threading.Lock()
        self._complaints = Complaints()
        self._channel, theirs = socket.socketpair()
        layout = machine_layout()
        folder = str(Path(__file__).parent)
        code = f"import sys; sys.path.append({folder!r}); from inside.hall import main; main()"
        with theirs:
            self._process = subprocess.Popen(
                [layout.python, "-s", "-S", "-P", "-X", "utf8", "-c", code],
                stdin=theirs.fileno(),
                stdout=self._complaints.fileno(),
                stderr=self._complaints.fileno(),
                env=clean_environment(layout),
                start_new_session=True,
            )
        # Also when it is forgotten, or the program ends.
        self._end = weakref.finalize(self, _end, self._channel, self._process, self._complaints)
        try:
            answer = self._hello()
            self.users = bool(answer["users"])
            self.missing = tuple(answer["missing"])
            self._prove()
        except BaseException:
            self.close()
            raise

    def boot(self) -> Machine:
        """Start a machine.

        Raises SandboxBroken when that is no longer possible.
        """
        ours, theirs = socket.socketpair()
        machine = Machine(ours)
        try:
            with theirs, self._lock:
                socket.send_fds(self._channel, [b"m"], [theirs.fileno()])
            machine.wait_until_ready()
        except (OSError, MachineLost) as error:
            machine.close()
            told = self._complaints.last()
            raise SandboxBroken(f"no machine starts any more: {error} {told}") from error
        return machine

    def close(self) -> None:
        """End every machine, and wait for that; safe to repeat."""
        self._end()

    def __enter__(self) -> "Machines":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _hello(self) -> dict[str, Any]:
        limits = {
            "memory_bytes": self.limits.memory_mb << 20,
            "processes": self.limits.processes,
            "disk_bytes": self.limits.disk_mb << 20,
            "output_bytes": self.limits.output_kb << 10,
        }
        answer: dict[str, Any] | None = None
        with contextlib.suppress(OSError):
            self._channel.sendall(wire.pack_message({"limits": limits}))
            if select.select([self._channel], [], [], _START_SECONDS)[0]:
                answer = wire.read_message(self._channel.fileno())
        answer = answer or {"error": self._complaints.last() or "it died"}
        if "error" in answer:
            raise SandboxUnavailable(f"No private machine starts: {answer['error']}. {_ADVICE}")
        return answer

    def _prove(self) -> None:
        try:
            with contextlib.closing(self.boot()) as machine:
                turn = machine.type("id -u; echo $((6 * 7))", 20.0)
        except (SandboxBroken, MachineLost) as error:
            raise SandboxUnavailable(f"No private machine works: {error}. {_ADVICE}") from error
        if turn.output != "0\n42\n":
            raise SandboxUnavailable(
                f"No private machine works: 0 and 42 came as {turn}. {_ADVICE}"
            )


def _end(
    channel: socket.socket, process: "subprocess.Popen[bytes]", complaints: Complaints
) -> None:
    channel.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    complaints.close()
