"""The supervisor: takes jobs from the parent, watches over programs, sends outcomes back."""

import gc
import os
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn

from . import jail, wire
from .running import Running
from .zygote import Zygote

_TICK_MS = 20
# Programs that closed their output and only have to be cleared away do not hold up the next.
_MAX_LEAVING = 4
# fmt: off
_PRELOADED = (
    "bisect", "collections.abc", "contextlib", "copy", "csv", "dataclasses", "datetime",
    "decimal", "enum", "fractions", "functools", "heapq", "io", "itertools",
    "json", "math", "operator", "pathlib", "random", "re", "sqlite3",
    "statistics", "string", "typing", "encodings.ascii", "encodings.latin_1",
    "encodings.unicode_escape",
)
# fmt: on


def main() -> NoReturn:
    """Build the jail, fork the zygote, serve until stdin ends."""
    sys.path.pop()
    config = wire.read_message(0)
    if config is None:
        os._exit(0)
    try:
        _preload()
        proc = jail.enter(config["layout"])
    except Exception as error:
        wire.write_all(1, wire.pack_message({"error": f"{type(error).__name__}: {error}"}))
        os._exit(1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        _become_zygote(ours, theirs, proc, config["limits"])
    theirs.close()
    wire.write_all(1, wire.pack_message({"ready": True}))
    gc.freeze()
    Supervisor(ours, proc, config["limits"]).loop()


def _preload() -> None:
    """Import what small programs import most: it is then there in every clone."""
    for name in _PRELOADED:
        __import__(name)


def _become_zygote(
    ours: socket.socket, theirs: socket.socket, proc: int, limits: dict[str, Any]
) -> NoReturn:
    ours.close()
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.close(nothing)
    try:
        Zygote(theirs, proc, limits).serve()
    finally:
        os._exit(1)


class Supervisor:
    """Runs one program at a time, and clears away those that have ended."""

    def __init__(self, zygote: socket.socket, proc: int, limits: dict[str, Any]) -> None:
        self._zygote = zygote
        self._proc = proc
        self._limits = limits
        self._running: dict[int, Running] = {}
        self._by_pipe: dict[int, Running] = {}
        self._children, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._poller = select.poll()
        self._poller.register(self._children, select.POLLIN)
        self._listening = False

    def loop(self) -> NoReturn:
        """Serve until stdin ends or the zygote is gone."""
        while True:
            self._listen(self._has_room())
            for fd, _ in self._poller.poll(_TICK_MS if self._running else None):
                # An event may be older than what the events before it have changed.
                if fd == 0:
                    self._start()
                elif fd == self._children:
                    self._reap()
                elif fd in self._by_pipe and not self._by_pipe[fd].drain(fd):
                    self._forget(fd)
            now = time.monotonic()
            for program in self._running.values():
                program.look(now)

    def _has_room(self) -> bool:
        busy = sum(program.busy for program in self._running.values())
        return busy == 0 and len(self._running) < _MAX_LEAVING

    def _listen(self, wanted: bool) -> None:
        # Jobs wait in the pipe, in the parent's care, until there is room.
        if wanted and not self._listening:
            self._poller.register(0, select.POLLIN)
        elif self._listening and not wanted:
            self._poller.unregister(0)
        self._listening = wanted

    def _start(self) -> None:
        job = wire.read_job(0)
        if job is None:
            os._exit(0)
        number, snapshot, body = job
        program = Running(number, snapshot, self._limits, self._proc)
        program.spawn(self._zygote, body)
        if program.pid < 0:
            self._send(program)
            return
        self._running[program.pid] = program
        for fd in program.pipes:
            self._by_pipe[fd] = program
            self._poller.register(fd, select.POLLIN)

    def _forget(self, fd: int) -> None:
        self._poller.unregister(fd)
        del self._by_pipe[fd]

    def _reap(self) -> None:
        os.read(self._children, 4096)
        while True:
            try:
                pid, code, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                os._exit(1)
            if pid == 0:
                return
            program = self._running.pop(pid, None)
            if program is None:
                os._exit(1)  # the zygote
            program.ended(code, usage)
            for fd in program.pipes:
                if fd in self._by_pipe:
                    self._forget(fd)
            self._send(program)

    def _send(self, program: Running) -> None:
        wire.write_all(1, wire.pack_message(program.report()))
