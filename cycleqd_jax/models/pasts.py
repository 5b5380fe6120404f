"""Finished texts whose keys and values are still in their place: one can go on from there."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq

# A row that goes on is worth a place that decodes nothing for so many steps.
_RESTS = 3


@dataclass(eq=False)
class Past:
    """A text of a candidate, prompt and answer, whose `tokens` were read in a `place`."""

    candidate: int
    tokens: tuple[int, ...]
    place: int
    steps: int = 0

    def common(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt need not be read: all of it but the last one at most."""
        same = sum(1 for _ in takewhile(bool, map(eq, self.tokens, prompt)))
        return min(same, len(prompt) - 1)


class Pasts:
    """The pasts of a batch, by the tickets of their texts; none unless they are to be kept."""

    def __init__(self, *, keep: bool) -> None:
        self.keep = keep
        self._of: dict[int, Past] = {}

    @property
    def places(self) -> set[int]:
        """The places that nothing else may take."""
        return {past.place for past in self._of.values()}

    def rest(self, ticket: int, past: Past) -> bool:
        """A text ended; whether its place is kept for what may follow."""
        if self.keep:
            self._of[ticket] = past
        return self.keep

    def get(self, ticket: int | None) -> Past | None:
        """The past of a text, if it is still there."""
        return None if ticket is None else self._of.get(ticket)

    def take(self, ticket: int | None) -> Past | None:
        """The same; it is another text's from now on."""
        return None if ticket is None else self._of.pop(ticket, None)

    def age(self) -> list[int]:
        """A step was done; returns the places of those that rested for too long."""
        for past in self._of.values():
            past.steps += 1
        old = [ticket for ticket, past in self._of.items() if past.steps > _RESTS]
        return [self._of.pop(ticket).place for ticket in old]

    def move(self, new_place: dict[int, int]) -> None:
        """The rows of the batch move."""
        for past in self._of.values():
            past.place = new_place[past.place]
