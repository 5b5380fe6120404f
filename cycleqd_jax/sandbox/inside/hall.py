"""The process from which private machines start: it holds their common system and forks them."""

import os
import signal
import socket
import sys
from typing import Any, NoReturn

from . import identity, image, kernel, wire
from .machine import Machine

BASE, SCRATCH, ROOT = "/tmp/base", "/tmp/scratch", "/tmp/root"
_SYSTEM_BYTES = 1 << 30


def main() -> NoReturn:
    """Build the system in memory, then fork a machine for every socket that arrives on stdin."""
    sys.path.pop()
    config = wire.read_message(0)
    if config is None:
        os._exit(0)
    try:
        users = identity.enter(kernel.CLONE_NEWNS)
        kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
        flags = kernel.MS_NODEV
        kernel.mount("tmpfs", "/tmp", "tmpfs", flags, f"mode=755,size={_SYSTEM_BYTES}")
        for folder in (BASE, SCRATCH, ROOT):
            os.mkdir(folder)
        missing = image.build(BASE)
    except Exception as error:
        wire.write_all(0, wire.pack_message({"error": f"{type(error).__name__}: {error}"}))
        os._exit(1)
    wire.write_all(0, wire.pack_message({"users": users, "missing": missing}))
    Hall(config["limits"], users).serve()


class Hall:
    """Forks machines until its socket is closed, then ends those that are left."""

    def __init__(self, limits: dict[str, int], users: bool) -> None:
        self._limits = limits
        self._users = users
        self._machines: set[int] = set()

    def serve(self) -> NoReturn:
        """Serve until stdin ends."""
        with socket.socket(fileno=0) as channel:
            while True:
                message, fds, _, _ = socket.recv_fds(channel, 1, 1)
                self._forget_ended()
                if not message:
                    self._end()
                pid = os.fork()
                if pid == 0:
                    self._become_machine(fds[0])
                self._machines.add(pid)
                for fd in fds:
                    os.close(fd)

    def _become_machine(self, fd: int) -> NoReturn:
        try:
            # The numbers 0 to 2 stay taken, or they would be given to something else.
            os.dup2(1, 0)
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
            # The socket is the only way in or out, and may not be inherited by accident.
            os.set_inheritable(fd, False)
            Machine(fd, self._limits, self._users).live(BASE, SCRATCH, ROOT)
        except BaseException as error:
            message: dict[str, Any] = {"lost": f"{type(error).__name__}: {error}"}
            try:
                wire.write_all(fd, wire.pack_message(message))
            finally:
                os._exit(1)

    def _forget_ended(self) -> None:
        while self._machines:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._machines.discard(pid)

    def _end(self) -> NoReturn:
        for pid in self._machines:
            os.kill(pid, signal.SIGTERM)
        for pid in self._machines:
            os.waitpid(pid, 0)
        os._exit(0)
