from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from cycleqd_jax.qd.evidence import (
    Belief,
    Evidence,
    binomial_noise,
    probability_better,
    sample_noise,
)

EVALUATIONS, ROWS, TASKS = 9, 2, 2


def numbers(evidence):
    return [np.asarray(x) for x in (evidence.count, evidence.scores, evidence.variance)]


def pooled(samples):
    """Count, mean and variance per row in double precision; an evaluation with a hole is none."""
    count, mean, variance = [], [], []
    for rows in np.moveaxis(np.asarray(samples, np.float64), 1, 0):
        whole = rows[np.isfinite(rows).all(axis=1)]
        count.append(len(whole))
        mean.append(whole.mean(axis=0) if len(whole) else np.full(TASKS, np.nan))
        variance.append(whole.var(axis=0, ddof=1) if len(whole) > 1 else np.full(TASKS, np.nan))
    return np.asarray(count), np.stack(mean), np.stack(variance)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    offset=st.sampled_from([0.0, 0.5, -30.0, 1000.0]),
    holes=st.lists(
        st.tuples(
            st.integers(0, EVALUATIONS - 1),
            st.integers(0, ROWS - 1),
            st.integers(0, TASKS - 1),
            st.sampled_from([np.nan, np.inf, -np.inf]),
        ),
        max_size=12,
    ),
    part=st.lists(st.integers(0, 3), min_size=EVALUATIONS, max_size=EVALUATIONS),
)
def test_merging_any_split_is_pooling_and_bad_evaluations_never_enter(seed, offset, holes, part):
    rng = np.random.default_rng(seed)
    samples = (offset + rng.normal(size=(EVALUATIONS, ROWS, TASKS))).astype(np.float32)
    for n, row, task, bad in holes:
        samples[n, row, task] = bad
    merged = None
    for group in range(4):
        # Evaluations of other groups are holes, so that every part has one shape.
        own = np.where((np.asarray(part) == group)[:, None, None], samples, np.nan)
        evidence = Evidence.of(own)
        merged = evidence if merged is None else merged.merge(evidence)
    count, mean, variance = pooled(samples)
    for found in (numbers(merged), numbers(Evidence.of(samples))):
        np.testing.assert_array_equal(found[0], count)
        np.testing.assert_allclose(found[1], mean, rtol=1e-6, atol=1e-6)
        # Rounding of the data themselves: an ulp of the offset against a spread of one.
        np.testing.assert_allclose(found[2], variance, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 12345.678])
@pytest.mark.parametrize("split", [1, 3, 7])
def test_equal_evaluations_leave_no_rounding(value, split):
    samples = np.full((10, 1, 2), value, np.float32)
    evidence = Evidence.of(samples[:split]).merge(Evidence.of(samples[split:]))
    np.testing.assert_array_equal(evidence.mean, samples[0])
    np.testing.assert_array_equal(evidence.m2, 0.0)


def test_nothing_merged_with_something_is_that_something():
    something = Evidence.of(np.random.default_rng(0).normal(size=(5, 3, 2)))
    nothing = Evidence.of(np.full((2, 3, 2), np.nan))
    assert np.isnan(nothing.scores).all()
    for merged in (something.merge(nothing), nothing.merge(something)):
        jax.tree.map(np.testing.assert_array_equal, merged, something)


def belief(mean, variance, freedom):
    return Belief(*(jnp.asarray(x, jnp.float32) for x in (mean, variance, freedom)))


def test_the_test_is_welchs_when_the_prior_weighs_nothing():
    rng = np.random.default_rng(1)
    noise = sample_noise(1.0, 1e-6)
    for n, m in ((3, 3), (2, 9), (8, 20)):
        a, b = rng.normal(0.5, 1, size=(n, 40, 1)), rng.normal(0, 2, size=(m, 40, 1))
        found = probability_better(noise(Evidence.of(a)), noise(Evidence.of(b)))
        expected = 1 - scipy.stats.ttest_ind(a, b, equal_var=False, alternative="greater").pvalue
        np.testing.assert_allclose(found, expected, atol=0.008)


@pytest.mark.parametrize(("freedom", "error"), [(1, 8e-3), (2, 2e-3), (3, 1e-3), (50, 1e-4)])
def test_students_distribution_is_followed_closely(freedom, error):
    t = np.linspace(-30, 30, 601)
    found = probability_better(belief(t, np.ones(601), np.full(601, freedom)), belief(0.0, 0, 1))
    np.testing.assert_allclose(found, scipy.stats.t.cdf(t, freedom), atol=error)


def test_infinite_freedom_is_the_normal_distribution():
    found = probability_better(belief(1.0, 0.75, np.inf), belief(0.0, 0.25, np.inf))
    assert float(found) == pytest.approx(scipy.stats.norm.cdf(1.0), abs=1e-6)


@pytest.mark.parametrize("variance", [0.0, 1e-38, 1e-30, 1e30])
def test_no_variance_is_too_small_or_too_large(variance):
    scale = np.sqrt(variance) if variance else 1.0
    means = scale * np.asarray([9.0, 0.0, -9.0])
    a, b = belief(means, np.full(3, variance), np.full(3, 60)), belief(0.0, variance, 60)
    found = probability_better(a, b)
    np.testing.assert_allclose(found, [1.0, 0.5, 0.0], atol=1e-5)
    if variance == 0:
        np.testing.assert_array_equal(found, [1.0, 0.5, 0.0])


def test_one_evaluation_has_the_prior_variance_and_many_their_own():
    noise = sample_noise([0.04, 0.09], 4.0)
    once = noise(Evidence.of(np.zeros((1, 1, 2))))
    np.testing.assert_allclose(once.variance, [[0.04, 0.09]], rtol=1e-6)
    np.testing.assert_array_equal(once.freedom, [[4.0, 4.0]])
    samples = np.random.default_rng(2).normal(size=(5000, 1, 2))
    often = noise(Evidence.of(samples))
    np.testing.assert_allclose(often.variance, samples.var(axis=0) / 5000, rtol=5e-3)
    twice = noise(Evidence.of(np.full((2, 1, 2), 0.3)))
    np.testing.assert_allclose(twice.variance, [[0.04 * 4 / 5 / 2, 0.09 * 4 / 5 / 2]], rtol=1e-6)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_equals_seem_better_as_seldom_as_the_confidence_says(confidence):
    rng = np.random.default_rng(3)
    noise = sample_noise(0.09, 20.0)
    a, b = rng.normal(0.0, 0.3, size=(3, 20_000, 1)), rng.normal(0.0, 0.3, size=(8, 20_000, 1))
    better = probability_better(noise(Evidence.of(a)), noise(Evidence.of(b)))
    assert np.mean(np.asarray(better) >= confidence) == pytest.approx(1 - confidence, abs=0.01)


@pytest.mark.parametrize(
    ("solved", "tried"), [((1, 0), (1, 1)), ((9, 6), (10, 10)), ((40, 20), (64, 32))]
)
def test_shares_are_compared_as_posteriors(solved, tried):
    rng = np.random.default_rng(4)
    draws = [rng.beta(s + 1, n - s + 1, 200_000) for s, n in zip(solved, tried, strict=True)]
    noise = [binomial_noise(n) for n in tried]
    rows = [Evidence.of(np.full((1, 1, 1), s / n)) for s, n in zip(solved, tried, strict=True)]
    found = probability_better(noise[0](rows[0]), noise[1](rows[1]))
    assert float(found[0, 0]) == pytest.approx(np.mean(draws[0] > draws[1]), abs=0.02)


def test_evaluations_of_shares_add_up():
    whole = binomial_noise(20)(Evidence.of(np.full((1, 1, 2), 0.35)))
    parts = binomial_noise([10, 10])(Evidence.of(np.asarray([[[0.2, 0.5]], [[0.5, 0.2]]])))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), whole, parts)


class TestBadInput:
    @pytest.mark.parametrize("shape", [(3, 2), (0, 3, 2)])
    def test_samples(self, shape):
        with pytest.raises(ValueError, match="expected scores of shape \\(evaluations, genotypes"):
            Evidence.of(np.zeros(shape))

    def test_evidence_of_other_shapes(self):
        with pytest.raises(ValueError, match=r"expected \(3, 2\).*found \(2, 2\)"):
            Evidence.of(np.zeros((1, 3, 2))).merge(Evidence.of(np.zeros((1, 2, 2))))

    @pytest.mark.parametrize("variance", [-0.1, np.nan, np.inf, [[0.1]]])
    def test_prior_variance(self, variance):
        with pytest.raises(ValueError, match="prior_variance: expected"):
            sample_noise(variance)

    @pytest.mark.parametrize("count", [0.0, -1.0, np.inf, np.nan])
    def test_prior_count(self, count):
        with pytest.raises(ValueError, match="prior_count: expected"):
            sample_noise(0.1, count)

    @pytest.mark.parametrize("problems", [0, -3, np.nan, [[5]]])
    def test_problems(self, problems):
        bad: Any = problems
        with pytest.raises(ValueError, match="at least 1 problem an evaluation"):
            binomial_noise(bad)
