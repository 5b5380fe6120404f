"""A small team of elites that together solve as many problems as possible.

Elites of different archives solve different problems; a router, a vote or simply trying one after
another gains most from a team whose members complement each other. Choosing it is maximum
coverage: greedy choice reaches at least ``1 - 1/e`` of the best coverage (Nemhauser, Wolsey and
Fisher, Mathematical Programming 14, 1978), swaps and a branch and bound do the rest.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt64

NODES = 2_000
"""Nodes the branch and bound may look at by default."""


@dataclasses.dataclass(frozen=True)
class Team:
    """A team of T elites.

    Attributes:
        indices: (T,) row of each member, the one that adds most first.
        gains: (T,) problems each member solves that none before it does; at least 1, and they do
            not grow.
        solved: (problems,) which problems at least one member solves.
        optimal: no team of the size asked for solves more; False where the search was cut short.
    """

    indices: Int[np.ndarray, " team"]
    gains: Int[np.ndarray, " team"]
    solved: Bool[np.ndarray, " problems"]
    optimal: bool

    @property
    def covered(self) -> int:
        """Number of problems at least one member solves, the sum of the gains."""
        return int(self.solved.sum())


def select_team(solved: Any, size: int, scores: Any = None, *, nodes: int = NODES) -> Team:
    """Choose the team that solves the most problems.

    Greedily the elite that adds most is taken; then single members are swapped while that helps;
    then a branch and bound looks for a better team. Elites that add equally many are taken by the
    higher mean score, then the lower index; a team is changed only for strictly more problems.
    Members who would add nothing are left out, so a team may be smaller than asked for, and empty
    if nobody solves anything.

    Args:
        solved: (elites, problems) bool, which elite solves which problem.
        size: members at most.
        scores: (elites, K) scores whose mean breaks ties; default: the share of solved problems.
        nodes: how many nodes the branch and bound may look at, some 70 microseconds each for a
            thousand elites and problems; 0 leaves it out.

    Raises:
        ValueError: `solved` is not a boolean table, no elite, a size below 1, negative nodes, or
            scores that are not finite or not one row an elite.
    """
    table = np.asarray(solved)
    if table.ndim != 2 or table.dtype != np.bool_ or table.shape[0] < 1:
        raise ValueError(
            "solved: expected booleans of shape (elites, problems) with at least one elite, found "
            f"{table.dtype} of shape {table.shape}"
        )
    if size < 1:
        raise ValueError(f"size: expected a team of at least 1, found {size}")
    if nodes < 0:
        raise ValueError(f"nodes: expected 0 or more, found {nodes}")
    # In this order "the first of the best" breaks every tie as promised.
    order = np.argsort(-_mean_scores(table, scores), kind="stable")
    words = _pack(table[order])
    members = _swap(words, _greedy(words, range(len(words)), size))
    members, optimal = _Search(words, size, members, nodes).run()
    members = _greedy(words, members, size)
    indices, gains = order[members], []
    covered = np.zeros(table.shape[1], bool)
    for index in indices:
        gains.append(int((table[index] & ~covered).sum()))
        covered |= table[index]
    return Team(indices, np.asarray(gains, np.int64), covered, optimal)


def _mean_scores(table: np.ndarray, scores: Any) -> np.ndarray:
    if scores is None:
        return table.sum(axis=1)
    array = np.asarray(scores, np.float64)
    if array.ndim != 2 or len(array) != len(table) or not np.isfinite(array).all():
        raise ValueError(
            f"scores: expected finite numbers of shape ({len(table)}, tasks), one row an elite, "
            f"found shape {array.shape}" + ("" if np.isfinite(array).all() else " with bad values")
        )
    return array.mean(axis=1)


def _pack(table: np.ndarray) -> UInt64[np.ndarray, "elites words"]:
    """Rows of bits in 64-bit words, zeros after the last problem."""
    packed = np.packbits(table, axis=1)
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))
    return padded.view(np.uint64)


def _gains(words: np.ndarray, covered: np.ndarray) -> Int[np.ndarray, " elites"]:
    """Problems each row solves that are not covered yet."""
    return np.bitwise_count(words & ~covered).sum(axis=1, dtype=np.int64)


def _union(words: np.ndarray) -> UInt64[np.ndarray, " words"]:
    return np.bitwise_or.reduce(words, axis=0)


def _greedy(words: np.ndarray, candidates: Any, size: int) -> list[int]:
    """Rows in the order in which they add most, the first candidate on a tie."""
    rest, chosen = np.sort(np.asarray(candidates, np.int64)), list[int]()
    covered = np.zeros(words.shape[1], np.uint64)
    for _ in range(min(size, len(rest))):
        gains = _gains(words[rest], covered)
        best = int(np.argmax(gains))
        if gains[best] == 0:
            break
        chosen.append(int(rest[best]))
        covered |= words[rest[best]]
    return chosen


def _swap(words: np.ndarray, members: list[int]) -> list[int]:
    """Exchange single members for strictly better ones until none is left."""
    position = 0
    while position < len(members):
        others = members[:position] + members[position + 1 :]
        gains = _gains(words, _union(words[others]))
        best = int(np.argmax(gains))
        if gains[best] > gains[members[position]]:
            members = [*others, best]
            position = 0
        else:
            position += 1
    return members


class _Search:
    """Depth-first branch and bound.

    What is added to a team never adds more than it does now, so a team is at most worth its
    coverage and the largest gains that still fit in.
    """

    def __init__(self, words: np.ndarray, size: int, members: list[int], nodes: int) -> None:
        self._words = words
        self._size = size
        self._left = nodes
        self._cut = False
        self.members = members
        self._best = int(np.bitwise_count(_union(words[members])).sum())

    def run(self) -> tuple[list[int], bool]:
        """The best team found, and whether none is better."""
        if self._best < np.bitwise_count(_union(self._words)).sum():
            nothing = np.zeros(self._words.shape[1], np.uint64)
            self._visit(nothing, 0, [], np.arange(len(self._words)))
        return self.members, not self._cut

    def _visit(
        self, covered: np.ndarray, count: int, chosen: list[int], candidates: np.ndarray
    ) -> None:
        if self._left == 0:
            self._cut = True
            return
        self._left -= 1
        gains = _gains(self._words[candidates], covered)
        order = np.argsort(-gains, kind="stable")
        candidates, gains = candidates[order], gains[order]
        open_places = self._size - len(chosen)
        for i, (candidate, gain) in enumerate(
            zip(candidates.tolist(), gains.tolist(), strict=True)
        ):
            if self._cut or count + int(gains[i : i + open_places].sum()) <= self._best:
                return
            team = [*chosen, candidate]
            if count + gain > self._best:
                self._best, self.members = count + gain, team
            if len(team) < self._size:
                self._visit(
                    covered | self._words[candidate], count + gain, team, candidates[i + 1 :]
                )
