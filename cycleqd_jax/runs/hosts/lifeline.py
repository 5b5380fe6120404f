"""Who of the processes of a run is still there: nobody waits for ever for one that is lost.

Collectives say nothing useful when a process dies: some raise after a while, some never return, and
JAX's own service ends what is left with a stack trace. So every process keeps one TCP connection to
process 0, over which both sides give a sign of life now and then. A connection that closes without
a word, or falls silent, means a lost process; whoever notices tells the others, and all end with
one plain message, whatever they are doing. A process that ends with an error of its own says so.
"""

import contextlib
import ctypes
import hmac
import json
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SILENCE = 25.0
"""Seconds without a sign of life after which a process counts as lost (stopped, or cut off)."""

_BEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.2
# An error that all have (it came out of what they gathered) is printed by each itself.
_GRACE_SECONDS = 3.0
_FAREWELL_SECONDS = 10.0
_CONNECT_SECONDS = 60.0
AGAIN = "start the same command again on every host: the run goes on from its last checkpoint"


@dataclass
class _Link:
    """A connection to one other process."""

    socket: socket.socket
    heard: float = field(default_factory=time.monotonic)
    rest: bytes = b""
    leaving: bool = False

    def tell(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # whoever reads from a broken link notices
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """What has come in; None once the other side has closed."""
        try:
            data = self.socket.recv(1 << 16)
        except (BlockingIOError, TimeoutError):
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


class Doors:
    """Where process 0 waits for the others' connections.

    Args:
        host: the address under which they reach it.

    Attributes:
        address: what they need to know, in JSON's types.
    """

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=256)
        port = self._listener.getsockname()[1]
        # Not a secret of weight: it keeps strangers and other runs from being taken for a process.
        self.address = {"host": host, "port": port, "token": secrets.token_hex(16)}

    def admit(self, count: int) -> dict[int, socket.socket]:
        """The connections of all other processes, by their number.

        Raises:
            ConnectionError: one of them did not come within a minute.
        """
        found: dict[int, socket.socket] = {}
        deadline = time.monotonic() + _CONNECT_SECONDS
        with self._listener:
            while len(found) < count - 1:
                missing = sorted(set(range(1, count)) - found.keys())
                self._listener.settimeout(max(0.0, deadline - time.monotonic()))
                try:
                    guest, _ = self._listener.accept()
                except (TimeoutError, BlockingIOError) as error:
                    raise ConnectionError(
                        f"process 0: expected connections of the processes {missing} at port "
                        f"{self.address['port']}, found none within {_CONNECT_SECONDS:g} s: let "
                        "the hosts reach each other on all ports"
                    ) from error
                guest.settimeout(_CONNECT_SECONDS)
                said = _line(guest)
                token = str(said.get("token", ""))
                if hmac.compare_digest(token, self.address["token"]) and said["process"] in missing:
                    found[said["process"]] = guest
                else:
                    guest.close()
        return found


def knock(address: Mapping[str, Any], index: int) -> socket.socket:
    """Another process's connection to process 0.

    Raises:
        ConnectionError: there is no way to it.
    """
    where = (address["host"], address["port"])
    try:
        link = socket.create_connection(where, timeout=_CONNECT_SECONDS)
    except OSError as error:
        raise ConnectionError(
            f"process {index}: expected process 0 at {where[0]}:{where[1]}, cannot connect "
            f"({error}): let the hosts reach each other on all ports"
        ) from error
    link.sendall(json.dumps({"process": index, "token": address["token"]}).encode() + b"\n")
    return link


class Lifeline:
    """Watches the other processes from a thread of its own until `close` or `leave`.

    A verdict on another one ends this process, three seconds later unless it ends by itself.

    Args:
        index: of this process.
        count: of processes.
        links: connections, by the other's number: all others' in process 0, else that to it.
        say: shows the message with which this process ends.
        silence: seconds without a sign of life after which a process is lost.
        end: ends this process with an exit code; for tests.
    """

    def __init__(
        self,
        index: int,
        count: int,
        links: Mapping[int, socket.socket],
        say: Callable[[str], None],
        *,
        silence: float = SILENCE,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._index = index
        self._count = count
        self._say = say
        self._silence = silence
        self._end = end
        self._lock = threading.Lock()
        self._links = {number: _Link(link) for number, link in links.items()}
        # Leaving: it ends by itself, and says why. Closed: all is done, nobody is watched any more.
        self._leaving = self._closed = False
        self._verdict, self._judged = "", 0.0
        for link in links.values():
            link.settimeout(_BEAT_SECONDS)
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Part from the others, who do the same now: all is done."""
        self._leaving = self._closed = True
        self._tell({"bye": True})
        self._thread.join()

    def leave(self, why: str) -> None:
        """Tell the others why this process is about to end; process 0 waits until they are gone."""
        self._leaving = True
        self._tell({"who": self._index, "said": why})
        if self._index == 0:  # JAX's service is here: without it the others end in a stack trace
            self._thread.join(_FAREWELL_SECONDS)

    def await_verdict(self) -> None:
        """Sleep for as long as it takes to find who is lost, which ends this process."""
        time.sleep(self._silence + 3 * _GRACE_SECONDS)

    def _tell(self, message: Mapping[str, Any], but: int | None = None) -> None:
        with self._lock:
            for number, link in self._links.items():
                if number != but:
                    link.tell(message)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for number, link in self._links.items():
                selector.register(link.socket, selectors.EVENT_READ, number)
            looked = told = time.monotonic()
            while self._links and not self._closed:
                ready = [key.data for key, _ in selector.select(_LOOK_SECONDS)]
                now = time.monotonic()
                if now - looked > self._silence / 2:
                    # This process itself was stopped, or starved: the others have to be heard anew.
                    for link in self._links.values():
                        link.heard = now
                looked = now
                for number in ready:
                    self._hear(number, selector)
                for number, link in list(self._links.items()):
                    if now - link.heard > self._silence:
                        self._judge(number, f"no sign of life for {self._silence:g} s")
                        self._drop(number, selector)
                if now - told > _BEAT_SECONDS:
                    self._tell({})
                    told = now
                if self._verdict and not self._leaving and now - self._judged > _GRACE_SECONDS:
                    break
            if self._verdict and not self._leaving:
                self._finish()
            for number in list(self._links):
                self._drop(number, selector)

    def _hear(self, number: int, selector: selectors.BaseSelector) -> None:
        link = self._links[number]
        messages = link.read()
        if messages is None:
            if not link.leaving:
                self._judge(number, "its connection closed without a word")
            self._drop(number, selector)
            return
        for message in messages:
            if message.get("bye"):
                link.leaving = True
            elif "said" in message:
                link.leaving |= message["who"] == number
                self._judge(message["who"], "", message["said"])
            elif "lost" in message:
                self._judge(message["lost"], message["how"])

    def _drop(self, number: int, selector: selectors.BaseSelector) -> None:
        with self._lock:
            link = self._links.pop(number)
        selector.unregister(link.socket)
        link.socket.close()

    def _judge(self, who: int, how: str, said: str | None = None) -> None:
        """The first reason to end counts; process 0 passes it on."""
        if self._verdict or self._leaving or who == self._index:
            return
        name = f"process {who} of {self._count}"
        self._judged = time.monotonic()
        if said is None:
            self._verdict = f"{name} is lost ({how}): {AGAIN}"
            self._tell({"lost": who, "how": how}, but=who)
        else:
            self._verdict = f"{name} has ended, and so does this one: {said}"
            self._tell({"who": who, "said": said}, but=who)

    def _finish(self) -> None:
        """End this process, which waits for what will not come, or works in vain."""
        self._say(self._verdict)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        if self._index == 0:  # the last to go, see `leave`
            for link in self._links.values():
                while time.monotonic() < deadline and link.read() is not None:
                    time.sleep(0.01)
        self._end(2)


def linger_on_abort() -> None:
    """Let a thread that aborts the process sleep for a moment before.

    When process 0 dies, JAX's service aborts the others at once, from a thread of its own and
    before they could say why. As handler of SIGABRT, which has the number 6, ``sleep`` of the C
    library is called as ``sleep(6)``, and the lifeline has these seconds to end the process itself.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal.restype = ctypes.c_void_p
    library.signal(int(signal.SIGABRT), ctypes.cast(library.sleep, ctypes.c_void_p))


def own_address() -> str:
    """The address of this computer in the network, as others see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # chooses a route, sends nothing
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])


def _line(link: socket.socket) -> dict[str, Any]:
    """The first line of a connection, or nothing where there is none."""
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < 1024:
            if not (more := link.recv(1)):
                break
            data += more
        found = json.loads(data)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
