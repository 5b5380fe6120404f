"""One supervisor process and the pipes to it; it is started again when it dies."""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .base import SandboxUnavailable
from .complaints import Complaints
from .inside import wire

_START_SECONDS = 20.0


class Worker:
    """A supervisor behind the wall.

    command, environment: how to start it. config: its first message, as JSON.
    Raises SandboxUnavailable, with what it said, when it does not come up.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], config: Mapping[str, object]
    ) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._hello = wire.pack_message(dict(config))
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints = Complaints()
        self._outgoing = bytearray()
        self._incoming = bytearray()
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """A fresh process, whatever became of the last one."""
        self.stop()
        self._complaints.clear()
        # Its own group, so that nothing of it survives stop().
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints.fileno(),
            env=self._environment,
            start_new_session=True,
            bufsize=0,
        )
        os.set_blocking(self.reading, False)
        os.set_blocking(self.writing, False)
        self._outgoing, self._incoming = bytearray(self._hello), bytearray()
        answer = self._first_answer()
        if "ready" not in answer:
            self.stop()
            raise SandboxUnavailable(str(answer.get("error", "")) or self.complaint() or "died")

    def complaint(self) -> str:
        """The end of what it wrote to its standard error."""
        return self._complaints.last()

    def _first_answer(self) -> dict[str, Any]:
        deadline = time.monotonic() + _START_SECONDS
        try:
            self.flush()
            while time.monotonic() < deadline:
                select.select([self.reading], [], [], deadline - time.monotonic())
                for message in self.receive():
                    return message
        except OSError:
            return {}
        return {"error": f"no answer after {_START_SECONDS:.0f} s"}

    @property
    def session(self) -> int:
        """Number of the process group and session that holds every process of the worker."""
        return 0 if self._process is None else self._process.pid

    @property
    def reading(self) -> int:
        """Descriptor on which outcomes arrive."""
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    @property
    def writing(self) -> int:
        """Descriptor on which jobs leave."""
        assert self._process is not None
        assert self._process.stdin is not None
        return self._process.stdin.fileno()

    @property
    def alive(self) -> bool:
        """Whether it has been started and not been stopped."""
        return self._process is not None

    @property
    def waiting_to_write(self) -> bool:
        """Whether a job is only partly on its way."""
        return bool(self._outgoing)

    def send(self, data: bytes) -> None:
        """Queue a job; raises OSError when the process is gone."""
        self._outgoing += data
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes; raises OSError when the process is gone."""
        with contextlib.suppress(BlockingIOError):
            while self._outgoing:
                del self._outgoing[: os.write(self.writing, self._outgoing[: 1 << 20])]

    def receive(self) -> Iterator[dict[str, Any]]:
        """The messages that have arrived; raises OSError when the process is gone."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.reading, 1 << 20):
                self._incoming += piece
            raise BrokenPipeError("the sandbox server ended")
        while True:
            size = wire.message_length(self._incoming)
            if size is None or len(self._incoming) < size:
                return
            message = wire.unpack_message(self._incoming[:size])
            del self._incoming[:size]
            yield message

    def kill(self) -> None:
        """End it without waiting for it to finish anything."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End it and everything below it; safe to repeat."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        # It ends when its input does, and takes all its programs along.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        with contextlib.suppress(ProcessLookupError):
            for _ in range(100):
                os.killpg(process.pid, signal.SIGKILL)
                process.poll()
                time.sleep(0.01)
        process.wait()

    def close(self) -> None:
        """Stop for good."""
        self.stop()
        self._complaints.close()
