"""OS interaction in Docker containers, for users who have an engine.

Never run against a real engine: it is tested with a stand-in for the ``docker`` package. The
terminal and its protocol are those of the private machines (`cycleqd_jax.sandbox.inside.turn`).
"""

import contextlib
import time
from typing import Any

from cycleqd_jax.sandbox.base import SandboxBroken
from cycleqd_jax.sandbox.inside.turn import Turns
from cycleqd_jax.sandbox.machines import Ended, MachineLimits, MachineLost, Turn

# Line by line, without echo and keys, as `su` and other shells need it.
_SHELL = "stty -echo -isig -iexten -ixon -opost && exec bash --login --noediting"
_START_SECONDS = 20.0
_KILLED = 137  # by `timeout`


class Containers:
    """A container for every episode.

    Args:
        image: with bash, python3 and coreutils; AgentBench v0.2 calls its own local-os/default.
        limits: of a container; a limit on its disk is the engine's business.
        network: whether containers have the engine's default network; v0.2's had.

    Raises:
        ValueError: no engine answers, or it lacks the image; the message says what to do.
        ImportError: the ``docker`` package is not installed.
    """

    users = True

    def __init__(
        self, image: str, limits: MachineLimits | None = None, network: bool = False
    ) -> None:
        self._docker = _package()
        self._image = image
        self._limits = limits or MachineLimits()
        self._network = network
        try:
            self._client = self._docker.from_env()
            self._client.images.get(image)
        except self._docker.errors.ImageNotFound as error:
            raise ValueError(
                f"Docker has no image {image!r}: build it from AgentBench's "
                "data/os_interaction/res/dockerfiles, `docker build -f default -t "
                f"{image} data/os_interaction/res/dockerfiles`"
            ) from error
        except (OSError, self._docker.errors.DockerException) as error:
            raise ValueError(
                f"no Docker engine answers ({error}): start one, or unset CYCLEQD_OS_IMAGE to use "
                "private machines in the sandbox"
            ) from error

    def boot(self) -> "Container":
        """Start a container; see `Backend.boot`."""
        memory = f"{self._limits.memory_mb}m"
        try:
            running = self._client.containers.run(
                self._image,
                "bash",
                detach=True,
                tty=True,
                stdin_open=True,
                remove=True,
                network_mode="bridge" if self._network else "none",
                mem_limit=memory,
                memswap_limit=memory,
                pids_limit=self._limits.processes,
            )
        # The package lets through what its HTTP library raises, which are OSErrors.
        except (OSError, self._docker.errors.DockerException) as error:
            raise SandboxBroken(f"no container starts any more: {error}") from error
        container = Container(self._client, running, self._limits, self._docker.errors)
        try:
            container.open_terminal()
        except MachineLost as error:
            container.close()
            raise SandboxBroken(f"no shell starts in a container: {error}") from error
        return container


class Container:
    """One container and the agent's shell in it."""

    def __init__(self, client: Any, running: Any, limits: MachineLimits, errors: Any) -> None:
        self._client = client
        self._running = running
        self._limits = limits
        self._errors = errors
        self._socket: Any = None
        self._turns = Turns()
        self._seen = bytearray()
        self._ended = False

    def open_terminal(self) -> None:
        """Start the shell, and wait until it no longer prompts."""
        with self._as_lost():
            made = self._client.api.exec_create(
                self._running.id,
                ["bash", "-c", _SHELL],
                stdin=True,
                tty=True,
                environment={"TERM": "dumb"},
            )
            opened = self._client.api.exec_start(made["Id"], tty=True, socket=True)
            # The package hands out a wrapper that cannot write.
            self._socket = getattr(opened, "_sock", opened)
        if self.type("", _START_SECONDS).state != "done":
            raise MachineLost("the shell does not answer")

    def type(self, command: str, seconds: float) -> Turn:
        """Type a command; see `System.type`."""
        if self._ended:
            return Turn("", "closed")
        deadline = time.monotonic() + seconds
        with self._as_lost():
            self._socket.settimeout(seconds)
            self._socket.sendall(self._turns.type(command))
        while (length := self._turns.length(self._seen)) < 0:
            left = deadline - time.monotonic()
            piece = self._receive(left) if left > 0 else None
            if not piece:
                self._ended = piece == b""
                return self._show(len(self._seen), "closed" if self._ended else "late")
            self._seen += piece
            if len(self._seen) > self._limits.output_kb << 10:
                self.close()
                raise MachineLost("output limit")
        return self._show(length, "done")

    def run(self, command: list[str], seconds: float) -> Ended:
        """Run a program beside the shell; see `System.run`."""
        if any("\0" in word for word in command):
            raise ValueError(f"expected arguments without NUL characters, found {command!r}")
        bounded = ["timeout", "--signal=KILL", f"{seconds:.3f}", *command]
        with self._as_lost():
            code, (output, _) = self._running.exec_run(bounded, demux=True, workdir="/")
        text = (output or b"").decode("utf-8", "replace")
        return Ended(None if code == _KILLED else code, text)

    def close(self) -> None:
        """Remove the container; see `System.close`."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
        # It may be gone already, or the engine is.
        with contextlib.suppress(OSError, self._errors.DockerException):
            self._running.kill()

    def _receive(self, seconds: float) -> bytes | None:
        """What the terminal shows: None for nothing in time, b"" for nothing ever again."""
        self._socket.settimeout(seconds)
        try:
            return bytes(self._socket.recv(65536))
        except TimeoutError:
            return None
        except OSError:
            return b""

    def _show(self, length: int, state: Any) -> Turn:
        output = self._turns.show(self._seen[:length])
        self._seen.clear()
        return Turn(output, state)

    @contextlib.contextmanager
    def _as_lost(self) -> Any:
        try:
            yield
        except (OSError, self._errors.DockerException) as error:
            raise MachineLost(f"the container does not answer: {error}") from error


def _package() -> Any:
    try:
        import docker
    except ImportError as missing:
        raise ImportError(
            "OS problems in Docker need the docker package: pip install 'cycleqd-jax[docker]'"
        ) from missing
    return docker
