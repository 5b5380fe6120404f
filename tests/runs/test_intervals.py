"""Intervals against values of statsmodels and properties that define them."""

import pytest

from cycleqd_jax.runs.results.intervals import wilson, wilson_of_mean


@pytest.mark.parametrize(
    ("score", "problems", "low", "high"),
    [(0.5, 10, 0.23659, 0.76341), (0.0, 20, 0.0, 0.16113), (1.0, 20, 0.83887, 1.0)],
)
def test_wilson_is_the_published_interval(
    score: float, problems: int, low: float, high: float
) -> None:
    assert wilson(score, problems) == pytest.approx((low, high), abs=1e-5)


def test_the_mean_of_one_task_has_its_interval_and_more_tasks_narrow_it() -> None:
    assert wilson_of_mean([0.3], [50]) == pytest.approx(wilson(0.3, 50))
    low, high = wilson_of_mean([0.3] * 4, [50] * 4)
    one = wilson(0.3, 50)
    assert 0.3 - low == pytest.approx((0.3 - one.low) / 2)
    assert high - 0.3 == pytest.approx((one.high - 0.3) / 2)


@pytest.mark.parametrize(("score", "problems"), [(0.5, 0), (1.5, 10), (float("nan"), 10)])
def test_what_is_no_share_is_refused(score: float, problems: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        wilson(score, problems)
