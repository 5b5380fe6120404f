"""Orders of problems whose beginnings are fair."""

import numpy as np
import pytest

from cycleqd_jax.tasks.base import Problem
from cycleqd_jax.tasks.stratified import strata_of, stratified_order

STRATA = ["a"] * 16 + ["b"] * 8 + ["c"] * 7 + ["d"]


@pytest.mark.parametrize("seed", range(5))
def test_every_beginning_holds_each_stratum_in_its_share(seed: int) -> None:
    order = stratified_order(STRATA, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(len(STRATA)))
    drawn = np.array(STRATA)[order]
    for count in range(1, len(STRATA) + 1):
        for stratum in "abcd":
            expected = count * STRATA.count(stratum) / len(STRATA)
            assert abs((drawn[:count] == stratum).sum() - expected) <= 2


def test_an_order_is_random_within_a_stratum_and_follows_its_seed() -> None:
    firsts = {
        int(stratified_order(["a"] * 8, np.random.default_rng(seed))[0]) for seed in range(60)
    }
    assert firsts == set(range(8))
    one, again = (stratified_order(STRATA, np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(one, again)


def test_kinds_tell_problems_apart_or_else_the_experts() -> None:
    def problem(kind: str) -> Problem:
        return Problem(prompt="", answers=("",), solution="", document="", kind=kind)

    solved = np.array([[1.0, 0.0], [1.0, 1.0]])
    assert strata_of([problem("x"), problem("y")], solved) == ["x", "y"]
    assert strata_of([problem("x"), problem("x")], solved) == [2.0, 1.0]
