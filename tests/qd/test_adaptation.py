from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.qd.adaptation import ControlSettings, begin, improvements, learn, turns
from cycleqd_jax.qd.grid import bins_of, make_grid
from cycleqd_jax.qd.schedule import cycle_every, cycle_per_child, cycle_per_generation

K, CELLS, SIZE = 3, 16, 4
GRID = make_grid([0.0, 0.0, -1.0], [1.0, 2.0, 1.0], 4)
EMPTY_CELLS = jnp.full((K, CELLS), -1, jnp.int32)
SETTINGS = ControlSettings(population=6, patience=3)


def start(settings=SETTINGS):
    return begin(settings, SIZE, jax.random.key(0), jnp.zeros((1, K)), EMPTY_CELLS)


def tell(state, scores, schedule=cycle_per_generation, settings=SETTINGS):
    """A generation whose children enter nothing: the archives stay empty."""
    return learn(
        state,
        GRID,
        jnp.zeros((1, K)),
        EMPTY_CELLS,
        jnp.asarray(scores, jnp.float32),
        schedule=schedule,
        settings=settings,
    )


def scores_of(seed, batch):
    return np.random.default_rng(seed).uniform(size=(batch, K)).astype(np.float32)


def occupied(state, quality=0.5):
    return state.replace(incumbents=jnp.full((K, CELLS), quality))


def slow_improvements(incumbents, scores, new_cell):
    """The rule of the module, one child and one archive at a time."""
    bins = np.asarray(bins_of(GRID, jnp.nan_to_num(scores)))
    lower, upper = np.asarray(GRID.lower), np.asarray(GRID.upper)
    earned, short = [], []
    for row, bin_of in zip(scores, bins, strict=True):
        gain, lack = 0.0, 0.0
        for k in range(K):
            others = [j for j in range(K) if j != k]
            rival = incumbents[k][bin_of[others[0]] * 4 + bin_of[others[1]]]
            span = upper[k] - lower[k]
            if rival == -np.inf:
                gain += new_cell + max((row[k] - lower[k]) / span, 0.0)
            else:
                gain += max((row[k] - rival) / span, 0.0)
                lack += max(min((row[k] - rival) / span, 0.0), -1.0)
        finite = np.isfinite(row).all()
        earned.append(gain if finite else 0.0)
        short.append(lack if finite else -K)
    return earned, short


@pytest.mark.parametrize("new_cell", [1.0, 0.0])
def test_improvements_follow_the_rule(new_cell):
    rng = np.random.default_rng(1)
    incumbents = np.where(rng.random((K, CELLS)) < 0.4, -np.inf, rng.normal(size=(K, CELLS)))
    scores = rng.normal(size=(40, K)).astype(np.float32)
    scores[3, 1], scores[7, 0], scores[9, 2] = np.nan, np.inf, -np.inf
    found = improvements(GRID, jnp.asarray(incumbents, jnp.float32), jnp.asarray(scores), new_cell)
    for ours, theirs in zip(found, slow_improvements(incumbents, scores, new_cell), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", [cycle_per_generation, cycle_per_child, cycle_every(5)])
def test_candidates_take_turns_in_their_archive(schedule):
    batch, population, told = 7, 3, np.zeros(K, int)
    children = jnp.zeros((K, population), jnp.int32)
    for generation in range(6):
        archive = np.asarray(schedule(jnp.int32(generation), batch, K))
        chosen = np.asarray(turns(children, jnp.asarray(archive)))
        for k, candidate in zip(archive, chosen, strict=True):
            assert candidate == told[k] % population
            told[k] += 1
        children = children.at[archive, chosen].add(1)


def test_an_archive_hears_only_of_its_own_children():
    """Other scores for the children of archive 1 change nothing in archives 0 and 2."""
    scores = scores_of(0, 36)
    other = np.where(np.arange(36)[:, None] % K == 1, scores_of(1, 36), scores)
    one, two = (tell(occupied(start()), s, cycle_per_child) for s in (scores, other))
    moved = [not np.array_equal(one.cmaes.mean[k], two.cmaes.mean[k]) for k in range(K)]
    assert moved == [False, True, False]
    assert (np.asarray(one.cmaes.num_updates) == 1).all()


def test_a_small_batch_waits_until_every_candidate_had_its_children():
    settings = ControlSettings(population=6, children=2)
    state = start(settings)
    for generation in range(6 * K + K):
        state = tell(occupied(state), scores_of(generation, 4), settings=settings)
        # With 4 children a generation, 6 candidates have had 2 each at the archive's third.
        turns_of = [len([g for g in range(generation + 1) if g % K == k]) for k in range(K)]
        assert np.asarray(state.cmaes.num_updates).tolist() == [n // 3 for n in turns_of]
    np.testing.assert_array_equal(state.children, [[1, 1, 1, 1, 0, 0]] * K)


def test_the_mean_moves_to_the_candidates_that_earned_most():
    """Candidate 4's child beats the incumbents by far, that of 2 a little, others not."""
    scores = np.full((6, K), -0.2, np.float32)
    scores[4], scores[2] = 0.9, 0.6
    state = start()
    told = tell(occupied(state), scores)
    fresh, (c0, c2, c4) = np.asarray(told.cmaes.mean[0]), np.asarray(state.candidates[0])[[0, 2, 4]]
    weights = np.log(3.5 / np.arange(1, 4))
    weights /= weights.sum()
    # Three of six are kept; the equals come in their order.
    np.testing.assert_allclose(fresh, weights @ np.stack([c4, c2, c0]), rtol=1e-5)
    assert not np.array_equal(told.candidates[0], state.candidates[0])
    np.testing.assert_array_equal(told.candidates[1:], state.candidates[1:])


def test_a_population_of_equals_tells_nothing():
    state = start()
    told = tell(occupied(state), np.zeros((6, K)))
    np.testing.assert_array_equal(told.cmaes.mean, state.cmaes.mean)
    assert told.stalled.tolist() == [1, 0, 0]
    assert not np.array_equal(told.candidates[0], state.candidates[0])


class TestRestart:
    def test_after_patience_without_improvement(self):
        state = start()
        for generation in range(3 * K):
            state = tell(occupied(state), scores_of(generation, 6) - 5.0)
            # The third population of archive k is told in generation 2 K + k.
            assert state.restarts.tolist() == [int(generation >= 2 * K + k) for k in range(K)]
        np.testing.assert_array_equal(state.cmaes.mean, np.zeros((K, SIZE)))
        np.testing.assert_array_equal(state.cmaes.sigma, np.full(K, 0.5, np.float32))

    def test_an_improvement_ends_the_wait(self):
        state = start()
        for generation, lift in enumerate([-5.0] * 2 * K + [5.0] * K + [-5.0] * 2 * K):
            state = tell(occupied(state), scores_of(generation, 6) + lift)
        assert state.restarts.tolist() == [0] * K
        assert state.stalled.tolist() == [2] * K

    @pytest.mark.parametrize("scale", [{"sigma": 1e-6}, {"sigma": 50.0}, {"eigenvalues": 1e8}])
    def test_a_useless_step_begins_anew_at_the_mean(self, scale):
        state = occupied(start())
        mean = jnp.full((K, SIZE), 1.5)
        cmaes = state.cmaes.replace(mean=mean, num_updates=jnp.full(K, 7, jnp.int32))
        if "sigma" in scale:
            cmaes = cmaes.replace(sigma=jnp.full(K, scale["sigma"]))
        else:
            spread = jnp.ones((K, SIZE)).at[:, 0].set(scale["eigenvalues"])
            cmaes = cmaes.replace(eigenvalues=spread, eigen_updates=cmaes.num_updates)
        # All alike: the update leaves the mean, and what is tested is the check behind it.
        told = tell(state.replace(cmaes=cmaes), np.full((6, K), 0.7))
        np.testing.assert_array_equal(told.cmaes.mean, mean)
        assert told.cmaes.sigma[0] == 0.5
        np.testing.assert_array_equal(told.cmaes.cov_matrix[0], np.eye(SIZE))
        assert told.restarts.tolist() == [0] * K

    def test_numbers_that_are_not_finite(self):
        state = occupied(start())
        broken = state.replace(
            cmaes=state.cmaes.replace(cov_matrix=state.cmaes.cov_matrix * jnp.nan)
        )
        told = tell(broken, scores_of(0, 6))
        assert told.restarts.tolist() == [1, 0, 0]
        assert np.isfinite(np.asarray(told.candidates[0])).all()


def test_failed_evaluations_rank_last_and_leave_no_trace():
    scores = scores_of(0, 6)
    scores[[1, 3, 5]] = np.nan
    state = start()
    told = tell(occupied(state), scores)
    weights = np.log(3.5 / np.arange(1, 4))
    candidates = np.asarray(state.candidates[0])
    possible = [
        (weights / weights.sum()) @ candidates[list(order)]
        for order in ((0, 2, 4), (0, 4, 2), (2, 0, 4), (2, 4, 0), (4, 0, 2), (4, 2, 0))
    ]
    assert min(np.abs(told.cmaes.mean[0] - p).max() for p in possible) < 1e-5
    for leaf in jax.tree.leaves(told.replace(key=0, incumbents=0)):
        assert np.isfinite(np.asarray(leaf)).all()


@pytest.mark.parametrize(("size", "population"), [(4, 8), (15, 12), (57, 16)])
def test_population_grows_with_the_map(size, population):
    args = jax.random.key(0), jnp.zeros((1, K)), EMPTY_CELLS
    state = jax.eval_shape(partial(begin, ControlSettings(), size), *args)
    assert state.candidates.shape == (K, population, size)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"population": 1}, "population of at least 2, found 1"),
        ({"sigma": 0.0}, "expected sigma between"),
        ({"sigma": 10.0}, "expected sigma between"),
        ({"children": 0}, "children must be at least 1"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"new_cell": -1.0}, "new_cell must not be negative"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        ControlSettings(**wrong)
