"""The same program on the same files is run once."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from .base import Job, Outcome, Sandbox, submit

_Key = tuple[object, ...]


class MemoSandbox:
    """A sandbox that remembers what it has run, inside a batch and across batches.

    inner: runs what is new; closed together with this one. capacity: outcomes kept, the least
    recently used ones go first. hits, misses: jobs answered from memory or together with an equal
    one that is under way, jobs handed on.

    Every kind of outcome is remembered, timeouts too: the same text must score the same. An error
    of the sandbox itself is not.
    Raises ValueError for a capacity below 1.
    """

    def __init__(self, inner: Sandbox, capacity: int = 100_000) -> None:
        if capacity < 1:
            raise ValueError(f"MemoSandbox.capacity: expected at least 1, found {capacity}")
        self.hits = 0
        self.misses = 0
        self._inner = inner
        self._capacity = capacity
        self._lock = threading.Lock()  # outcomes arrive in other threads
        self._known: OrderedDict[_Key, Outcome] = OrderedDict()
        self._wanted: dict[_Key, list[Future[Outcome]]] = {}

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Outcomes of `jobs` in their order; `inner` sees each different job once."""
        return [future.result() for future in self.submit(jobs)]

    def submit(self, jobs: Sequence[Job]) -> list[Future[Outcome]]:
        """Start `jobs` and return at once; see `submit` in `sandbox.base`."""
        futures: list[Future[Outcome]] = []
        new: dict[_Key, Job] = {}
        with self._lock:
            for job in jobs:
                future: Future[Outcome] = Future()
                future.set_running_or_notify_cancel()  # others may wait for the same job
                futures.append(future)
                key = _key(job)
                if key in self._known:
                    self._known.move_to_end(key)
                    future.set_result(_copy(self._known[key]))
                elif key in self._wanted:
                    self._wanted[key].append(future)
                else:
                    self._wanted[key] = [future]
                    new[key] = job
            self.misses += len(new)
            self.hits += len(jobs) - len(new)
        try:
            started = submit(self._inner, list(new.values()))
        except BaseException as error:
            with self._lock:
                waiting = [future for key in new for future in self._wanted.pop(key)]
            for future in waiting:
                future.set_exception(error)
            raise
        for key, inner in zip(new, started, strict=True):
            inner.add_done_callback(partial(self._settle, key))
        return futures

    def _settle(self, key: _Key, inner: Future[Outcome]) -> None:
        error = inner.exception()
        with self._lock:
            waiting = self._wanted.pop(key)
            if error is None:
                self._known[key] = inner.result()
                while len(self._known) > self._capacity:
                    self._known.popitem(last=False)
        for future in waiting:
            if error is None:
                future.set_result(_copy(inner.result()))
            else:
                future.set_exception(error)

    def known(self) -> Mapping[_Key, Outcome]:
        """What is remembered now, for a later `forget`."""
        with self._lock:
            return self._known.copy()

    def forget(self, but: Mapping[_Key, Outcome] | None = None) -> None:
        """Remember what was `known` then, or nothing; what is under way is added when it ends."""
        with self._lock:
            self._known = OrderedDict(but or {})

    def close(self) -> None:
        """Forget everything and close the inner sandbox."""
        self._inner.close()
        self.forget()

    def __enter__(self) -> "MemoSandbox":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _key(job: Job) -> _Key:
    return job.kind, job.source, tuple(sorted(job.files.items())), job.stdin, job.snapshot


def _copy(outcome: Outcome) -> Outcome:
    # The one mutable part: a caller's change must not reach the next caller.
    return outcome if outcome.files is None else replace(outcome, files=dict(outcome.files))
