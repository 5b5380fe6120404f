"""What crosses hosts: plain trees, gathered from all processes or sent from process 0.

Every process of a run runs the same program on its own devices and holds whole archives and models;
a process is called a host here, wherever it runs. Only results cross, as bytes, by all-gathers of
JAX (over gloo on CPUs, NCCL on GPUs, the interconnect of TPUs). Process 0 alone owns the run's
folder: the others need no file system in common with it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from flax.serialization import msgpack_restore, msgpack_serialize

from cycleqd_jax.runs.hosts.lifeline import Lifeline

# Of a transfer: every new size compiles a small program, so there are few.
_SMALLEST = 1 << 12
_LARGEST = 1 << 24


class HostsError(RuntimeError):
    """The processes of a run do not fit together, or one of them is lost."""


class Stopped(KeyboardInterrupt):
    """All processes of a run have agreed to stop, and all is written that another start needs."""


class Hosts:
    """A run's only process; what it gathers is its own.

    Attributes:
        index: number of this process.
        count: of processes.
    """

    index = 0
    count = 1

    @property
    def first(self) -> bool:
        """Whether this process owns the run's folder."""
        return self.index == 0

    def gather(self, value: Any, what: str) -> list[Any]:
        """Every process's value, by process; all must call it in the same order.

        Args:
            value: a tree of dictionaries, lists, arrays, numbers, texts and None.
            what: names it; all must gather the same.

        Raises:
            HostsError: another process gathers something else.
        """
        return [value]

    def broadcast(self, value: Any) -> Any:
        """The value of process 0, whatever the others give; a tree as of `gather`."""
        return value

    def waiting(self) -> dict[str, list[float]]:
        """How the hosts spent their time since the last call, by process; nothing of one alone.

        "busy" are seconds outside of gathers, "waiting" the share of its time for which a process
        was in one while others were not.
        """
        return {}

    def agree(self, value: Any, what: str, advice: str) -> None:
        """Refuse to go on where a value is not the same in all processes.

        Raises:
            HostsError: it says which processes differ from process 0, and the advice.
        """
        values = self.gather(value, what)
        others = [str(i) for i, found in enumerate(values) if found != values[0]]
        if others:
            raise HostsError(
                f"{what}: expected the same on every host, found another in process "
                f"{', '.join(others)} than in process 0; {advice}"
            )


ALONE = Hosts()
"""For runs of one process."""


class JoinedHosts(Hosts):
    """One of several processes that `jax.distributed` has joined.

    Args:
        lifeline: ends this process when another one is lost.
    """

    def __init__(self, lifeline: Lifeline) -> None:
        self.index = jax.process_index()
        self.count = jax.process_count()
        self._lifeline = lifeline
        self._busy, self._waited = np.zeros((2, self.count))
        self._gathered = 0
        self._free_since = time.perf_counter()

    def gather(self, value: Any, what: str) -> list[Any]:
        """As in `Hosts`; a process that waits here for a lost one is ended by its lifeline."""
        busy = time.perf_counter() - self._free_since
        head = {"what": f"{what} ({self._gathered})", "busy": busy}
        with self._explained():
            found = exchange([head, value])
        heads = [each[0] for each in found]
        for number, each in enumerate(heads):
            if each["what"] != head["what"]:
                raise HostsError(
                    f"the hosts are not at the same place: process {self.index} has "
                    f"{head['what']}, process {number} has {each['what']}; this is a bug"
                )
        times = np.array([each["busy"] for each in heads])
        self._busy += times
        self._waited += times.max() - times
        self._gathered += 1
        self._free_since = time.perf_counter()
        return [each[1] for each in found]

    def broadcast(self, value: Any) -> Any:
        """As in `Hosts`; what is large goes in parts."""
        data = msgpack_serialize([value]) if self.first else b""
        (size, *_) = self.gather(len(data), "size of a broadcast")
        with self._explained():
            parts = [
                _send(data[start : start + _LARGEST], min(_LARGEST, size - start))
                for start in range(0, size, _LARGEST)
            ]
        self._free_since = time.perf_counter()
        return msgpack_restore(b"".join(parts))[0]

    def waiting(self) -> dict[str, list[float]]:
        """As in `Hosts`."""
        busy, waited = self._busy, self._waited
        self._busy, self._waited = np.zeros((2, self.count))
        shares = waited / np.maximum(busy + waited, 1e-9)
        return {"busy": busy.tolist(), "waiting": shares.tolist()}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """The network knows sooner that somebody is gone than the lifeline knows who."""
        try:
            yield
        except (ValueError, RuntimeError):
            self._lifeline.await_verdict()
            raise


def exchange(value: Any) -> list[Any]:
    """Every process's tree (see `Hosts.gather`), by process, with nobody to watch over it."""
    from jax.experimental.multihost_utils import process_allgather

    data = msgpack_serialize(value)
    sizes = np.asarray(process_allgather(np.asarray(len(data), np.int32)))
    parts: list[list[bytes]] = [[] for _ in sizes]
    for start in range(0, int(sizes.max()), _LARGEST):
        part = data[start : start + _LARGEST]
        padded = _padded(part, _room(min(_LARGEST, int(sizes.max()) - start)))
        for number, row in enumerate(np.asarray(process_allgather(padded))):
            parts[number].append(row[: max(0, int(sizes[number]) - start)].tobytes())
    return [msgpack_restore(b"".join(part)) for part in parts]


def _send(data: bytes, size: int) -> bytes:
    """``size`` bytes of process 0, in every process."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return np.asarray(broadcast_one_to_all(_padded(data, _room(size))))[:size].tobytes()


def _room(size: int) -> int:
    """The next power of two, or that of the smallest transfer."""
    return max(_SMALLEST, 1 << (size - 1).bit_length())


def _padded(data: bytes, size: int) -> np.ndarray:
    return np.frombuffer(data.ljust(size, b"\0"), np.uint8)
