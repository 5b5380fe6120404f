"""Confidence intervals of scores that are means over n problems."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.959964
"""Two-sided 95% quantile of the normal distribution."""


class Interval(NamedTuple):
    """Ends of an interval in [0, 1]."""

    low: float
    high: float


def wilson(score: float, problems: int, z: float = Z95) -> Interval:
    """Wilson's interval of a share of solved problems (Wilson, JASA 22, 1927).

    With partial credit it is wider than need be: no score in [0, 1] varies more than a share of
    solved problems with the same mean.

    Raises:
        ValueError: no problems, or a score outside [0, 1].
    """
    if problems < 1:
        raise ValueError(f"problems: expected at least 1, found {problems}")
    if not 0 <= score <= 1:
        raise ValueError(f"score: expected a number in [0, 1], found {score}")
    shrink = 1 + z * z / problems
    centre = (score + z * z / (2 * problems)) / shrink
    half = z / shrink * math.sqrt(score * (1 - score) / problems + z * z / (4 * problems**2))
    # In exact arithmetic the score lies inside; at 0 and 1 it is an end.
    return Interval(max(0.0, min(centre - half, score)), min(1.0, max(centre + half, score)))


def wilson_of_mean(scores: Sequence[float], problems: Sequence[int], z: float = Z95) -> Interval:
    """Interval of the mean of K independent scores, from Wilson's of each.

    The distances of the ends are added in squares (Zou and Donner, Statistics in Medicine 27,
    2008), which keeps the lopsidedness of scores near 0 and 1.
    """
    parts = [(s, wilson(s, n, z)) for s, n in zip(scores, problems, strict=True)]
    mean, count = math.fsum(scores) / len(parts), len(parts)
    below = math.sqrt(math.fsum((s - interval.low) ** 2 for s, interval in parts)) / count
    above = math.sqrt(math.fsum((interval.high - s) ** 2 for s, interval in parts)) / count
    return Interval(max(0.0, mean - below), min(1.0, mean + above))
