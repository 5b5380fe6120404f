"""Prefixes that many prompts of a stream share: read once per candidate, when the first enters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cycleqd_jax.models.cache import KVCache
from cycleqd_jax.models.requests import Request
from cycleqd_jax.models.schedule import bucket, shared_prefixes

Tokens = tuple[int, ...]
Read = Callable[[np.ndarray, np.ndarray], KVCache]


class Prefixes:
    """The prefixes of the rows that wait.

    Args:
        read: the cache of tokens (rows, length), the rows of given candidates.
        groups: how many stacked candidates there are, 1 without.
        sizes: of batches.
    """

    def __init__(self, read: Read, groups: int, sizes: Sequence[int]) -> None:
        self._read, self._groups, self._sizes = read, groups, sizes
        self._of: dict[Tokens, _Prefix] = {}

    def share(self, requests: Sequence[Request]) -> None:
        """Decide what new rows have in common; they wait from now on."""
        shared = shared_prefixes([r.prompt for r in requests], [r.candidate for r in requests])
        for request, length in zip(requests, shared, strict=True):
            request.shared = length
            if length:
                self._of.setdefault(request.prefix, _Prefix()).add(request.candidate)

    def enter(
        self, tokens: Tokens, requests: Sequence[Request | None]
    ) -> tuple[KVCache, list[int]]:
        """Rows with this prefix wait no longer: its cache, and the row of it that is theirs."""
        prefix = self._of[tokens]
        if prefix.cache is None:
            order = list(range(self._groups))
            if self._groups == 1:
                order = sorted(prefix.candidates)
                order += order[:1] * (bucket(len(order), self._sizes) - len(order))
            prefix.row_of = {candidate: row for row, candidate in reversed(list(enumerate(order)))}
            rows = np.tile(np.array(tokens, np.int32), (len(order), 1))
            prefix.cache = self._read(rows, np.array(order, np.int32))
        prefix.waiting -= sum(request is not None for request in requests)
        if not prefix.waiting:
            del self._of[tokens]
        return prefix.cache, [0 if r is None else prefix.row_of[r.candidate] for r in requests]


@dataclass
class _Prefix:
    """Who asks for a prefix, how many rows wait, and its cache once it is read."""

    candidates: set[int] = field(default_factory=set)
    waiting: int = 0
    cache: KVCache | None = None
    row_of: dict[int, int] = field(default_factory=dict)

    def add(self, candidate: int) -> None:
        """One more row waits; a candidate that the cache lacks makes it void."""
        self.waiting += 1
        if candidate not in self.candidates:
            self.candidates.add(candidate)
            self.cache = None
