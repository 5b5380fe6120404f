"""What decoding decides on the host: the sizes of batches and caches, and shared prefixes.

Every shape comes from short lists of buckets, so that a whole run compiles a handful of programs.
"""

from collections.abc import Sequence

import numpy as np

_SMALLEST_BATCH = 4
_HALF_STEPS_FROM = 32
_PROMPT_UNIT = 16
_BLOCK_UNIT = 8
_SLOT_UNIT = 32
_PREFIX_UNIT = 32
# Prompts nest: chat template, then system prompt, then examples. Deeper trees are cut here.
_PREFIX_DEPTH = 8


def row_buckets(most: int, parts: int = 1) -> tuple[int, ...]:
    """Batch sizes up to `most`: powers of two, and their sums in pairs where that is much.

    All are rounded up to multiples of `parts`, the number of devices that a batch is split over.
    """
    sizes = [_SMALLEST_BATCH]
    while sizes[-1] < most:
        last = sizes[-1]
        power = last & (last - 1) == 0
        half = power and last >= _HALF_STEPS_FROM
        sizes.append(last * 3 // 2 if half else 1 << last.bit_length())
    rounded = (round_up(size, parts) for size in (*(s for s in sizes if s < most), most))
    return tuple(sorted(set(rounded)))


def bucket(count: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `count`; the largest one if none does."""
    return next((size for size in buckets if size >= count), buckets[-1])


def prompt_bucket(length: int) -> int:
    """Width of a prefill: steps of 16, of a quarter of a power of two from 128 on."""
    return round_up(length, _step(length, _PROMPT_UNIT))


def block_bucket(length: int) -> int:
    """Width of a block that is cut from a large prefill: half the steps up to 32 tokens."""
    return round_up(length, _BLOCK_UNIT) if length <= 2 * _PROMPT_UNIT else prompt_bucket(length)


def slot_bucket(slots: int) -> int:
    """Slots of a cache: steps of 32, of a quarter of a power of two from 256 on."""
    return round_up(slots, _step(slots, _SLOT_UNIT))


def prefix_bucket(length: int) -> int:
    """The part of a common prefix that is shared: rounded down to steps as of the cache."""
    return length - length % _step(length + 1, _PREFIX_UNIT)


def shared_prefixes(prompts: Sequence[Sequence[int]], candidates: Sequence[int]) -> list[int]:
    """How many first tokens of every prompt are worth a prefill of their own, 0 for none.

    Prompts that share them have the same number. Of nested prefixes the choice saves the most
    tokens: a prefix of p tokens saves p for every row but the first of each candidate. The last
    token of a prompt is never part of it.
    """
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    lengths = [0] * len(prompts)

    def divide(rows: list[int], depth: int) -> tuple[int, list[tuple[list[int], int]]]:
        """Tokens saved in the sorted `rows` at best, and the rows and length of each prefix."""
        spare = len(rows) - len({candidates[i] for i in rows})
        if spare < len(rows) // 2 or spare == 0:
            return 0, []
        common = _common(prompts[rows[0]], prompts[rows[-1]])
        shortest = min(len(prompts[i]) for i in rows)
        own = prefix_bucket(min(common, shortest - 1))
        whole = spare * own, [(rows, own)] if own else []
        if depth == _PREFIX_DEPTH:
            return whole
        groups: dict[int, list[int]] = {}
        for i in rows:
            groups.setdefault(prompts[i][common] if len(prompts[i]) > common else -1, []).append(i)
        if len(groups) == 1:
            return whole
        below = [divide(group, depth + 1) for group in groups.values()]
        parts = sum(saved for saved, _ in below), [part for _, found in below for part in found]
        return max(whole, parts, key=lambda choice: choice[0])

    if prompts:
        for rows, length in divide(order, 0)[1]:
            for i in rows:
                lengths[i] = length
    return lengths


class SlotTable:
    """Which slots of the cache the live rows of a batch need, `used` (rows, slots)."""

    def __init__(self, rows: int, slots: int) -> None:
        self.used = np.zeros((rows, slots), bool)

    @property
    def slots(self) -> int:
        """Number of slots of the cache."""
        return self.used.shape[1]

    @property
    def end(self) -> int:
        """One more than the last slot that a row needs."""
        return int(np.flatnonzero(self.used.any(axis=0)).max(initial=-1)) + 1

    def free(self) -> np.ndarray:
        """The slots that no row needs: generated tokens of all rows go there."""
        return np.flatnonzero(~self.used.any(axis=0))

    def enter(self, places: Sequence[int], width: int) -> None:
        """Rows begin with prompts of `width` slots; what the places held before is gone."""
        self.used[places] = False
        self.used[np.asarray(places, int)[:, None], np.arange(width)] = True

    def reshape(self, keep: np.ndarray, slots: int) -> None:
        """Follow the cache: only the rows `keep`, and `slots` slots."""
        kept = self.used[keep][:, :slots]
        self.used = np.pad(kept, ((0, 0), (0, slots - kept.shape[1])))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def _step(value: int, least: int) -> int:
    """A quarter of the power of two below `value`, at least `least`."""
    return max(least, 1 << max(0, (value - 1).bit_length() - 3))


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `value`."""
    return -(-value // unit) * unit
