"""An order of problems every beginning of which is a fair sample of all of them."""

from collections.abc import Hashable, Sequence

import numpy as np

from cycleqd_jax.tasks.base import Problem


def stratified_order(strata: Sequence[Hashable], dice: np.random.Generator) -> np.ndarray:
    """A random order in which every beginning holds the strata about in their shares.

    The i-th of a stratum's n members, in random order, stands at (i + u) / n of the whole, u drawn
    once a stratum, so that up to any place t there are n t of them, give or take one (systematic
    sampling; Cochran, "Sampling Techniques", chapter 8).

    Args:
        strata: what each problem belongs to.
        dice: random numbers.

    Returns:
        (N,) the problems' numbers in that order.
    """
    place = np.zeros(len(strata))
    for stratum in dict.fromkeys(strata):
        members = dice.permutation([i for i, own in enumerate(strata) if own == stratum])
        place[members] = (np.arange(len(members)) + dice.random()) / len(members)
    return np.argsort(place, kind="stable")


def strata_of(problems: Sequence[Problem], solved: np.ndarray) -> list[Hashable]:
    """What tells problems apart: their kinds, or how many experts solve them if they have one kind.

    Args:
        problems: of one task.
        solved: (experts, problems), the experts' scores on them.
    """
    kinds = [problem.kind for problem in problems]
    if len(set(kinds)) > 1:
        return list(kinds)
    return [float(score) for score in solved.sum(axis=0)]
