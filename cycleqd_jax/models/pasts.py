"""Finished texts whose keys and values are still there, so that what follows them is read alone.

Nothing is copied to keep them: a row rests in its place until another one takes it, and a batch
that is made anew leaves the cache of the old one behind, as long as it is among the last few.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq

from cycleqd_jax.models.cache import KVCache


@dataclass(eq=False)
class Past:
    """Where the keys and values of a text's `tokens` are: in `row` of the cache of a `batch`.

    `cache` is None while that is the live one, and when the past is `lost`. `awaited` says that a
    text which goes on from here waits for its turn.
    """

    tokens: tuple[int, ...]
    row: int
    batch: int
    cache: KVCache | None = None
    lost: bool = False
    awaited: bool = False

    def common(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt need not be read: all of it but the last one at most."""
        same = sum(1 for _ in takewhile(bool, map(eq, self.tokens, prompt)))
        return min(same, len(prompt) - 1)


class Pasts:
    """The pasts of a stream by ticket; of batches that are gone, those of the last `batches`."""

    def __init__(self, batches: int) -> None:
        self._kept = batches
        self._of: dict[int, Past] = {}
        self._resting: dict[int, int] = {}
        self._gone: deque[list[int]] = deque()
        self._batch = 0

    def rest(self, ticket: int, tokens: tuple[int, ...], place: int) -> bool:
        """A text ended in a place of the live batch; False where none are kept."""
        if not self._kept:
            return False
        self._of[ticket] = Past(tokens, place, self._batch)
        self._resting[place] = ticket
        return True

    def get(self, ticket: int) -> Past | None:
        """The past of a text, if it is still there."""
        return self._of.get(ticket)

    def worth(self, place: int) -> int:
        """What is lost when a place is taken: 0 nothing, 1 a past, 2 one that is waited for."""
        ticket = self._resting.get(place)
        return 0 if ticket is None else 1 + self._of[ticket].awaited

    def take(self, place: int) -> None:
        """Another row takes a place of the live batch."""
        ticket = self._resting.pop(place, None)
        if ticket is not None:
            self._of.pop(ticket).lost = True

    def leave(self, cache: KVCache | None) -> list[int]:
        """The live batch is made anew: its `cache` is left behind with all that rests there.

        Returns the places that are free of it now.
        """
        places = list(self._resting)
        if not places:
            return places
        for ticket in self._resting.values():
            self._of[ticket].cache = cache
        self._gone.append(list(self._resting.values()))
        self._resting = {}
        self._batch += 1
        if len(self._gone) > self._kept:
            for ticket in self._gone.popleft():
                past = self._of.pop(ticket)
                past.cache, past.lost = None, True
        return places
