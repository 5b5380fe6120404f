"""One program: its pipes, its clock, its memory, and what is reported of it."""

import os
import resource
import signal
import socket
import time
from typing import Any

from . import memory, wire, zygote
from . import snapshot as snapshots

_FIRST_LOOK, _NEXT_LOOK = 0.02, 0.02
# Sockets of the supervisor and the zygote themselves, and of programs that are cleared away.
_OUR_SOCKETS = 10


class Running:
    """A program from spawn to report.

    pid: negative when it could not be started.
    pipes: descriptors of stdout and stderr, not blocking.
    busy: it may still write to one of them, or closed them and runs on.
    """

    def __init__(self, number: int, snapshot: bool, limits: dict[str, Any], proc: int) -> None:
        self.pid = 0
        self.pipes: tuple[int, ...] = ()
        self._number = number
        self._snapshot = snapshot
        self._limits = limits
        self._proc = proc
        self._texts: dict[int, bytearray] = {}
        self._open: set[int] = set()
        self._status = self._reason = self._error = ""
        self._dead = self._runs_on = False
        self._socket_bytes = 0
        self._code = 0
        self._cpu = 0.0
        self._deadline = self._next_look = 0.0

    @property
    def busy(self) -> bool:
        """Whether it takes time that the next program should have."""
        return bool(self._open) or self._runs_on

    def spawn(self, channel: socket.socket, body: bytes) -> None:
        """Ask the zygote for a process and hand it the job."""
        job = os.memfd_create("job")
        wire.write_all(job, body)
        os.lseek(job, 0, os.SEEK_SET)
        self._control, control = socket.socketpair()
        self._socket_bytes = control.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        out, out_end = os.pipe2(os.O_CLOEXEC)
        err, err_end = os.pipe2(os.O_CLOEXEC)
        now = time.monotonic()
        self._deadline, self._next_look = now + self._limits["seconds"], now + _FIRST_LOOK
        kind = zygote.SNAPSHOT if self._snapshot else zygote.PLAIN
        socket.send_fds(channel, [kind], [job, control.fileno(), out_end, err_end])
        answer = channel.recv(4)
        if not answer:
            os._exit(1)
        control.close()
        for fd in (job, out_end, err_end):
            os.close(fd)
        self.pid = int.from_bytes(answer, "little", signed=True)
        self.pipes = out, err
        self._texts = {fd: bytearray() for fd in self.pipes}
        if self.pid < 0:
            self._error = f"clone: {os.strerror(-self.pid)}"
            return
        self._open = set(self.pipes)
        for fd in self.pipes:
            os.set_blocking(fd, False)

    def drain(self, fd: int) -> bool:
        """Take what is in a pipe; False when nothing more is wanted of it."""
        text = self._texts[fd]
        while True:
            try:
                piece = os.read(fd, 65536)
            except BlockingIOError:
                return True
            room = self._limits["output_bytes"] - len(text)
            text += piece[:room]
            if len(piece) > room:
                self._kill("killed", "output limit")
            elif piece:
                continue
            self._open.discard(fd)
            if not (self._open or self._dead):
                self._runs_on = not memory.is_ending(self._proc, self.pid)
            return False

    def look(self, now: float) -> None:
        """Enforce the limits that the kernel does not."""
        if now >= self._deadline:
            self._kill("timeout", "time limit")
        elif now >= self._next_look:
            self._next_look = now + _NEXT_LOOK
            # The interpreter's own pages are a present, here as in the limit of each process.
            most = self._limits["memory_bytes"] + memory.own_size(self._proc)
            processes, used = memory.usage(self._proc, self.pid, most)
            # What waits in a socket belongs to no process: each counts as if it were full.
            sockets = max(memory.sockets(self._proc) - _OUR_SOCKETS, 0)
            used += sockets * self._socket_bytes
            if used > most:
                self._kill("killed", "memory limit")
            elif processes > self._limits["processes"]:
                self._kill("killed", "process limit")

    def _kill(self, status: str, reason: str) -> None:
        if not self._status:
            self._status, self._reason = status, reason
        # Not yet waited for, so the number cannot belong to anybody else. It is the first
        # process of its namespace: the kernel kills all others with it.
        if not self._dead:
            os.kill(self.pid, signal.SIGKILL)

    def ended(self, wait_status: int, usage: resource.struct_rusage) -> None:
        """Everything of the program is dead; take what is left in the pipes."""
        self._code = os.waitstatus_to_exitcode(wait_status)
        self._cpu = usage.ru_utime + usage.ru_stime
        self._dead = True
        for fd in tuple(self._open):
            self.drain(fd)

    def report(self) -> dict[str, Any]:
        """The outcome, or an "error" of the sandbox itself; closes everything."""
        folder, ready = self._control_messages()
        try:
            if not ready and not self._status:
                error = self._error or f"process died before it began (exit code {self._code})"
                return {"id": self._number, "error": error}
            files = self._files(folder) if self._snapshot else None
            status, code = self._judge()
            out, err = (text.decode("utf-8", "replace") for text in self._texts.values())
            return {
                "id": self._number,
                "status": status,
                "returncode": code,
                "stdout": out,
                "stderr": err,
                "files": files,
                "reason": self._reason,
            }
        finally:
            for fd in (*self.pipes, folder):
                if fd >= 0:
                    os.close(fd)

    def _control_messages(self) -> tuple[int, bool]:
        folder, ready = -1, False
        with self._control as control:
            control.setblocking(False)
            while True:
                try:
                    message, fds, _, _ = socket.recv_fds(control, 500, 1)
                except OSError:
                    break
                if not message:
                    break
                folder = fds[0] if fds else folder
                ready = ready or message.endswith(zygote.READY)
                if message[:1] not in (zygote.READY, zygote.FOLDER):
                    self._error = message.decode("utf-8", "replace")
        return folder, ready

    def _files(self, folder: int) -> dict[str, str] | None:
        try:
            return snapshots.read_tree(folder, self._limits["snapshot_bytes"])
        except (snapshots.TooLarge, OSError) as error:
            self._status = self._status or "killed"
            self._reason = self._reason or f"snapshot limit: {error}"
            return None

    def _judge(self) -> tuple[str, int]:
        if self._status:
            return self._status, min(self._code, 0) or -signal.SIGKILL
        if self._code >= 0:
            return ("ok" if self._code == 0 else "error"), self._code
        if self._cpu >= self._limits["seconds"]:
            self._reason = "CPU limit"
            return "timeout", self._code
        self._reason = f"signal {-self._code}"
        return "killed", self._code
