import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.qd.hypervolume import hypervolume


def by_inclusion_and_exclusion(scores, reference):
    """Sum over all sets of boxes of the size of their common part, with alternating sign."""
    sides = [np.asarray(row, np.float64) - reference for row in scores]
    sides = [s for s in sides if np.isfinite(s).all() and (s > 0).all()]
    return sum(
        (-1) ** (count + 1) * np.prod(np.min(chosen, axis=0))
        for count in range(1, len(sides) + 1)
        for chosen in itertools.combinations(sides, count)
    )


def points(rows, tasks, seed=0):
    return np.random.default_rng(seed).uniform(size=(rows, tasks)).astype(np.float32)


@pytest.mark.parametrize("tasks", [2, 3])
def test_exact_for_two_and_three_tasks(tasks):
    for seed in range(6):
        scores = points(9, tasks, seed)
        reference = np.full(tasks, 0.2)
        expected = by_inclusion_and_exclusion(scores, reference)
        found = hypervolume(scores, reference)
        assert float(found.value) == pytest.approx(expected, rel=1e-5)
        assert float(found.standard_error) == 0.0
        traced = jax.jit(hypervolume)(jnp.asarray(scores), reference)
        assert float(traced.value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tasks", [4, 10])
def test_estimates_with_an_honest_error_for_more(tasks):
    scores, reference = points(9, tasks), np.zeros(tasks)
    expected = by_inclusion_and_exclusion(scores, reference)
    found = [hypervolume(scores, 0.0, jax.random.key(s), num_samples=2000) for s in range(40)]
    values = np.asarray([float(f.value) for f in found])
    errors = np.asarray([float(f.standard_error) for f in found])
    assert abs(values.mean() - expected) < 4 * errors.mean() / np.sqrt(40)
    # The error that is stated is the spread that is seen, and small even in ten dimensions.
    assert values.std(ddof=1) == pytest.approx(errors.mean(), rel=0.4)
    assert errors.max() < 0.05 * expected
    again = hypervolume(scores, 0.0, jax.random.key(7), num_samples=2000)
    assert float(again.value) == values[7]


@pytest.mark.parametrize("tasks", [2, 3, 4])
def test_what_adds_nothing(tasks):
    key = jax.random.key(0)
    corner = np.full((1, tasks), 0.5, np.float32)
    idle = np.concatenate(
        [
            corner,
            corner,  # a copy
            corner * 0.5,  # dominated
            np.eye(tasks, dtype=np.float32),  # at the reference on the other tasks
            np.full((1, tasks), -np.inf, np.float32),  # a free slot
            np.where(np.eye(tasks) > 0, np.nan, 9.0).astype(np.float32),
            np.where(np.eye(tasks) > 0, np.inf, 9.0).astype(np.float32),
        ]
    )
    assert float(hypervolume(idle, 0.0, key).value) == pytest.approx(0.5**tasks, rel=1e-6)
    nothing = hypervolume(corner, 0.5, key)
    assert (float(nothing.value), float(nothing.standard_error)) == (0.0, 0.0)


def test_it_grows_with_every_new_elite_on_the_front():
    scores = points(12, 3)
    seen = [np.where(np.arange(12)[:, None] <= n, scores, -np.inf) for n in range(12)]
    values = [float(hypervolume(rows).value) for rows in seen]
    assert all(b >= a for a, b in itertools.pairwise(values))
    assert float(hypervolume(scores, -1.0).value) > values[-1]


class TestBadInput:
    def test_shape(self):
        with pytest.raises(ValueError, match=r"at least 2 tasks\), found \(3, 1\)"):
            hypervolume(jnp.ones((3, 1)))

    def test_reference(self):
        with pytest.raises(ValueError, match=r"one number or 3, one a task, found shape \(2,\)"):
            hypervolume(jnp.ones((4, 3)), jnp.zeros(2))

    def test_no_key(self):
        with pytest.raises(ValueError, match="4 tasks is estimated: expected a random key"):
            hypervolume(jnp.ones((4, 4)))

    def test_too_few_samples(self):
        with pytest.raises(ValueError, match="num_samples: expected at least 2, found 1"):
            hypervolume(jnp.ones((4, 4)), 0.0, jax.random.key(0), num_samples=1)
