"""The same program on the same files is run once."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from .base import Job, Outcome, Sandbox


class MemoSandbox:
    """A sandbox that remembers what it has run, inside a batch and across batches.

    inner: runs what is new; closed together with this one. capacity: outcomes kept, the least
    recently used ones go first. hits, misses: jobs answered from memory, jobs handed on.

    Every kind of outcome is remembered, timeouts too: the same text must score the same.
    Raises ValueError for a capacity below 1.
    """

    def __init__(self, inner: Sandbox, capacity: int = 100_000) -> None:
        if capacity < 1:
            raise ValueError(f"MemoSandbox.capacity: expected at least 1, found {capacity}")
        self.hits = 0
        self.misses = 0
        self._inner = inner
        self._capacity = capacity
        self._known: OrderedDict[tuple[object, ...], Outcome] = OrderedDict()

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Outcomes of `jobs` in their order; `inner` sees each different job once."""
        keys = [_key(job) for job in jobs]
        new = {key: job for key, job in zip(keys, jobs, strict=True) if key not in self._known}
        outcomes = dict(zip(new, self._inner.run(list(new.values())) if new else [], strict=True))
        self.misses += len(new)
        self.hits += len(jobs) - len(new)
        for key in dict.fromkeys(keys):
            if key in self._known:
                self._known.move_to_end(key)
                outcomes[key] = self._known[key]
            self._known[key] = outcomes[key]
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return [_copy(outcomes[key]) for key in keys]

    def close(self) -> None:
        """Forget everything and close the inner sandbox."""
        self._known.clear()
        self._inner.close()

    def __enter__(self) -> "MemoSandbox":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _key(job: Job) -> tuple[object, ...]:
    return job.kind, job.source, tuple(sorted(job.files.items())), job.stdin, job.snapshot


def _copy(outcome: Outcome) -> Outcome:
    # The one mutable part: a caller's change must not reach the next caller.
    return outcome if outcome.files is None else replace(outcome, files=dict(outcome.files))
