import itertools
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cycleqd_jax.qd.team import select_team


def table(rows):
    return np.asarray([[c == "x" for c in row] for row in rows])


TRAP = table(["xxxx..", "xx..x.", "..xx.x"])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    elites=st.integers(1, 8),
    problems=st.integers(0, 70),
    size=st.integers(1, 5),
    density=st.floats(0.02, 0.6),
)
def test_no_team_solves_more_than_brute_force_says(seed, elites, problems, size, density):
    solved = np.random.default_rng(seed).random((elites, problems)) < density
    team = select_team(solved, size)
    best = max(
        int(solved[list(rows)].any(axis=0).sum())
        for rows in itertools.combinations(range(elites), min(size, elites))
    )
    assert team.optimal
    assert team.covered == best == team.gains.sum()
    np.testing.assert_array_equal(team.solved, solved[team.indices].any(axis=0))
    assert len(set(team.indices.tolist())) == len(team.indices) <= size
    assert (team.gains >= 1).all()
    assert (np.diff(team.gains) <= 0).all()
    covered = np.zeros(problems, bool)
    for index, gain in zip(team.indices, team.gains, strict=True):
        assert gain == (solved[index] & ~covered).sum()
        covered |= solved[index]


@pytest.mark.parametrize("seed", range(5))
def test_cut_short_it_is_still_as_good_as_greedy_guarantees_and_says_so(seed):
    solved = np.random.default_rng(seed).random((60, 120)) < 0.15
    full, cut = select_team(solved, 4, nodes=10**6), select_team(solved, 4, nodes=0)
    assert full.optimal
    assert not cut.optimal
    assert (1 - 1 / np.e) * full.covered <= cut.covered <= full.covered


def test_a_swap_improves_on_greedy():
    # Greedy takes row 0 for its four and ends with five.
    team = select_team(TRAP, 2, nodes=0)
    assert sorted(team.indices) == [1, 2]
    assert team.covered == 6
    assert team.optimal


def test_the_search_finds_what_no_single_swap_does():
    trap = table(["xxxxxx......", "......xxxxx.", "xxx...xxx...", "...xxx...xxx"])
    assert select_team(trap, 2, nodes=0).covered == 11
    team = select_team(trap, 2)
    assert sorted(team.indices) == [2, 3]
    assert (team.covered, team.optimal) == (12, True)


def test_ties_go_to_the_higher_mean_score_and_then_the_lower_index():
    solved = table(["xx....", "..xx..", "....xx", "xx...."])
    np.testing.assert_array_equal(select_team(solved, 3).indices, [0, 1, 2])
    scores = np.asarray([[0.1, 0.1], [0.5, 0.1], [0.2, 0.5], [0.2, 0.2]])
    np.testing.assert_array_equal(select_team(solved, 3, scores).indices, [2, 1, 3])


def test_members_that_add_nothing_are_left_out():
    team = select_team(table(["xxx", "xx.", "..x"]), 3)
    np.testing.assert_array_equal(team.indices, [0])
    np.testing.assert_array_equal(team.gains, [3])


@pytest.mark.parametrize("solved", [table(["...", "..."]), np.zeros((2, 0), bool)])
def test_nobody_solves_anything(solved):
    team = select_team(solved, 2)
    assert (team.indices.size, team.covered, team.optimal) == (0, 0, True)


def test_jax_arrays_are_welcome():
    assert select_team(jnp.asarray(TRAP), 2).covered == 6


def test_a_thousand_elites_and_problems_take_well_under_a_second():
    rng = np.random.default_rng(0)
    skill = rng.random((1000, 1)) * rng.random((1, 1000))
    solved = rng.random((1000, 1000)) < skill
    started = time.process_time()
    team = select_team(solved, 5)
    assert time.process_time() - started < 1
    assert team.covered > solved.sum(axis=1).max()


class TestBadInput:
    @pytest.mark.parametrize(
        "solved", [np.zeros(3, bool), np.zeros((2, 3)), np.zeros((0, 3), bool)]
    )
    def test_no_boolean_table(self, solved):
        with pytest.raises(ValueError, match=r"booleans of shape \(elites, problems\)"):
            select_team(solved, 1)

    @pytest.mark.parametrize("size", [0, -1])
    def test_size(self, size):
        with pytest.raises(ValueError, match=f"team of at least 1, found {size}"):
            select_team(TRAP, size)

    def test_nodes(self):
        with pytest.raises(ValueError, match="nodes: expected 0 or more, found -1"):
            select_team(TRAP, 2, nodes=-1)

    @pytest.mark.parametrize("scores", [np.ones(3), np.ones((4, 2)), np.full((3, 2), np.nan)])
    def test_scores(self, scores):
        wrong: Any = scores
        with pytest.raises(
            ValueError, match=r"scores: expected finite numbers of shape \(3, tasks"
        ):
            select_team(TRAP, 2, wrong)
