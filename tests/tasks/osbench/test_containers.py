"""Docker containers, against a stand-in for the package: no engine was ever asked."""

import contextlib
import os
import pty
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cycleqd_jax.sandbox.base import SandboxBroken
from cycleqd_jax.sandbox.machines import MachineLost
from cycleqd_jax.tasks.osbench.containers import Containers


class DockerException(Exception):  # noqa: N818
    pass


class ImageNotFound(DockerException):
    pass


class FakeClient:
    """As much of a client as is used; a "container" is a terminal on this machine."""

    def __init__(self) -> None:
        self.images = SimpleNamespace(get=self._image)
        self.containers = SimpleNamespace(run=self._run)
        self.api = SimpleNamespace(exec_create=self._create, exec_start=self._start)
        self.options: dict[str, Any] = {}
        self.killed = 0
        self._processes: list[subprocess.Popen[bytes]] = []

    def _image(self, name: str) -> None:
        if name != "local-os/default":
            raise ImageNotFound(name)

    def _run(self, image: str, command: str, **options: Any) -> Any:
        self.options = options
        return SimpleNamespace(id="c1", exec_run=self._exec_run, kill=self._kill)

    def _exec_run(self, command: list[str], demux: bool, workdir: str) -> Any:
        done = subprocess.run(command, capture_output=True, cwd=workdir, check=False)
        code = done.returncode
        return code if code >= 0 else 128 - code, (done.stdout or None, done.stderr or None)

    def _create(self, container: str, command: list[str], **options: Any) -> dict[str, Any]:
        assert options["tty"]
        return {"Id": command}

    def _start(self, command: list[str], tty: bool, socket: bool) -> Any:
        return SimpleNamespace(_sock=self._terminal(command))

    def _terminal(self, command: list[str]) -> Any:
        ours, theirs = socket.socketpair()
        master, line = pty.openpty()
        environment = {"PATH": os.defpath, "TERM": "dumb", "HOME": "/nonexistent"}
        process = subprocess.Popen(
            command, stdin=line, stdout=line, stderr=line, env=environment, start_new_session=True
        )
        os.close(line)
        self._processes.append(process)

        def type_in() -> None:
            with theirs, contextlib.suppress(OSError):  # whoever types may hang up at any time
                while data := theirs.recv(4096):
                    os.write(master, data)

        def show() -> None:
            with contextlib.suppress(OSError):
                while data := os.read(master, 4096):
                    theirs.sendall(data)
            with contextlib.suppress(OSError):
                theirs.shutdown(socket.SHUT_WR)
            os.close(master)

        for pump in (type_in, show):
            threading.Thread(target=pump, daemon=True).start()
        return ours

    def _kill(self) -> None:
        self.killed += 1
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeClient]:
    fake = FakeClient()
    package = ModuleType("docker")
    errors = SimpleNamespace(DockerException=DockerException, ImageNotFound=ImageNotFound)
    package.errors = errors  # type: ignore[attr-defined]
    package.from_env = lambda: fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "docker", package)
    yield fake
    fake._kill()


def test_a_container_is_typed_in_and_asked(client: FakeClient) -> None:
    container = Containers("local-os/default").boot()
    assert client.options["network_mode"] == "none"
    assert (client.options["mem_limit"], client.options["pids_limit"]) == ("512m", 64)
    assert container.type("cd /usr; x=3", 20.0) == ("", "done")
    assert container.type("pwd; echo $x", 20.0) == ("/usr\n3\n", "done")
    assert container.type("sleep 0.5; echo late", 0.2).state == "late"
    assert container.type("echo next", 20.0) == ("late\nnext\n", "done")
    assert container.run(["bash", "-c", "pwd; echo x >&2; exit 3"], 20.0) == (3, "/\n")
    assert container.run(["sleep", "60"], 0.2).code is None
    with pytest.raises(ValueError, match="NUL"):
        container.run(["echo", "\0"], 1.0)
    assert container.type("exit", 20.0).state == "closed"
    assert container.type("echo x", 20.0) == ("", "closed")
    container.close()
    assert client.killed == 1


def test_a_flood_ends_the_container(client: FakeClient) -> None:
    container = Containers("local-os/default").boot()
    with pytest.raises(MachineLost, match="output limit"):
        container.type("yes", 20.0)
    assert client.killed == 1


def test_an_engine_that_ends_is_no_crash(client: FakeClient) -> None:
    backend = Containers("local-os/default")
    container = backend.boot()

    # The package's HTTP library raises OSErrors, not the package's own exceptions.
    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionError("engine gone")

    container._running.kill = container._running.exec_run = gone
    client.containers.run = client.images.get = gone
    with pytest.raises(MachineLost, match="engine gone"):
        container.run(["true"], 1.0)
    container.close()
    with pytest.raises(SandboxBroken, match="no container starts any more: engine gone"):
        backend.boot()
    with pytest.raises(ValueError, match=r"no Docker engine answers \(engine gone\): start one"):
        Containers("local-os/default")


def test_what_is_missing_is_said(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no image 'other': build it .*docker build"):
        Containers("other")
    backend = Containers("local-os/default")

    def refuse(*_: Any, **__: Any) -> None:
        raise DockerException("no more")

    client.containers.run = refuse
    with pytest.raises(SandboxBroken, match="no container starts any more: no more"):
        backend.boot()
    monkeypatch.setattr(sys.modules["docker"], "from_env", refuse)
    with pytest.raises(ValueError, match=r"no Docker engine answers \(no more\): start one"):
        Containers("local-os/default")
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(ImportError, match="pip install"):
        Containers("local-os/default")
