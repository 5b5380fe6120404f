"""Texts packed into rows of tokens: what they begin with in common is there once, little is padded.

The texts of a row, sorted, are the paths of a forest of tokens in depth-first order. A token's
descendants then stand in one piece behind it, so one number a token says who may look where: slot i
sees slot j exactly if ``j <= i < end[j]``. The choices of a question share the question this way,
questions share their examples, and short texts fill a row with no mask between rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.struct
import numpy as np
from jaxtyping import Int

_NARROWEST = 256
_FEWEST_SCORED = 32
# A row has room for this many of the longest text that may enter it, so that the rest of a row that
# no text fits into stays small. Wider rows make attention dear, which is quadratic in the width.
_TEXTS_A_ROW = 2

Pair = tuple[Sequence[int], Sequence[int]]
"""A context of at least one token, and the continuation that is to be scored."""


class Packed(flax.struct.PyTreeNode):
    """Rows of packed texts, int32.

    `tokens`, `positions` (each token's place in its text) and `end` are (rows, width); `slot` and
    `target` (rows, scored) say what is scored: how likely `target` is after the token in `slot`.
    """

    tokens: Any
    positions: Any
    end: Any
    slot: Any
    target: Any


@dataclass(frozen=True)
class Batch:
    """Rows of one call, and the text that every scored token belongs to: -1 for none."""

    packed: Packed
    owner: Int[np.ndarray, "rows scored"]


@dataclass
class _Row:
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    scored: list[tuple[int, int, int]] = field(default_factory=list)
    # The text that was added last, and the slots of its tokens.
    text: tuple[int, ...] = ()
    path: list[int] = field(default_factory=list)


def pack(pairs: Sequence[Pair], longest: int, budget: int) -> list[Batch]:
    """Deal texts to batches of equal shapes, as few shapes as the lengths allow.

    Args:
        pairs: contexts and continuations, none of them empty; the last token of a continuation is
            scored but not read, so a text has one token less than both together.
        longest: the most tokens a text may have; no row is much wider than that.
        budget: tokens of a batch at most, where more than one row is in it; a batch has a power of
            two of rows.
    """
    classes: dict[int, list[int]] = {}
    for i, (context, continuation) in enumerate(pairs):
        width = _width(len(context) + len(continuation) - 1, longest)
        classes.setdefault(width, []).append(i)
    batches = []
    for width, members in sorted(classes.items()):
        filled = _fill(pairs, members, width)
        size = max(1, min(budget // width, _power_of_two(len(filled))))
        size = 1 << (size.bit_length() - 1)
        scored = max(_FEWEST_SCORED, _power_of_two(max(len(row.scored) for row in filled)))
        batches += [
            _batch(filled[first : first + size], size, width, scored)
            for first in range(0, len(filled), size)
        ]
    return batches


def packed_tokens(batches: Sequence[Batch]) -> int:
    """Tokens of all batches, unused slots included."""
    return sum(batch.packed.tokens.size for batch in batches)


def _width(length: int, longest: int) -> int:
    """A power of two that some texts of this length fit into."""
    wanted = min(_TEXTS_A_ROW * length, longest)
    return max(_NARROWEST, _power_of_two(max(wanted, length)))


def _fill(pairs: Sequence[Pair], members: Sequence[int], width: int) -> list[_Row]:
    """The rows of texts that fit into `width`, in the order of their tokens."""
    texts = {i: (*pairs[i][0], *pairs[i][1][:-1]) for i in members}
    filled: list[_Row] = []
    for i in sorted(members, key=texts.__getitem__):
        text, continuation = texts[i], pairs[i][1]
        if not filled or not _add(filled[-1], text, width):
            filled.append(_Row())
            _add(filled[-1], text, width)
        row = filled[-1]
        slots = row.path[-len(continuation) :]
        row.scored += [(s, t, i) for s, t in zip(slots, continuation, strict=True)]
    return filled


def _add(row: _Row, text: tuple[int, ...], width: int) -> bool:
    """Put a text behind the one it shares the most with, or say that the row has no room."""
    common = 0
    for ours, theirs in zip(text, row.text, strict=False):
        if ours != theirs:
            break
        common += 1
    first = len(row.tokens)
    if first + len(text) - common > width:
        return False
    stop = first + len(text) - common
    row.path = [*row.path[:common], *range(first, stop)]
    row.tokens += text[common:]
    row.positions += range(common, len(text))
    row.end += [stop] * (stop - first)
    for slot in row.path[:common]:
        row.end[slot] = stop
    row.text = text
    return True


def _batch(filled: Sequence[_Row], size: int, width: int, scored: int) -> Batch:
    # An unused slot sees itself only; an unused score repeats the first slot and is thrown away.
    alone = np.arange(1, width + 1, dtype=np.int32)
    packed = Packed(
        tokens=np.zeros((size, width), np.int32),
        positions=np.zeros((size, width), np.int32),
        end=np.tile(alone, (size, 1)),
        slot=np.zeros((size, scored), np.int32),
        target=np.zeros((size, scored), np.int32),
    )
    owner = np.full((size, scored), -1, np.int32)
    for r, row in enumerate(filled):
        packed.tokens[r, : len(row.tokens)] = row.tokens
        packed.positions[r, : len(row.tokens)] = row.positions
        packed.end[r, : len(row.tokens)] = row.end
        slots, targets, owners = zip(*row.scored, strict=True)
        packed.slot[r, : len(slots)] = slots
        packed.target[r, : len(slots)] = targets
        owner[r, : len(slots)] = owners
    return Batch(packed, owner)


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
