from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from cycleqd_jax.runs.watching.curves import draw_curves, plot_curves

TASKS = ("coding", "shell")


def rows(n):
    return [
        {
            "generation": g,
            "coverage": [0.1 * g, 0.05 * g],
            "qd_score": {"shell": 2.0 * g, "coding": 1.0 * g},
            "best": [0.5, float("nan") if g == 1 else 0.6],
        }
        for g in range(1, n + 1)
    ]


def test_every_panel_draws_every_task_over_the_generations():
    coverage, qd_score, best = draw_curves(rows(3), TASKS).axes
    drawn: list[tuple[Any, list[list[float]]]] = [
        (coverage, [[0.1, 0.2, 0.3], [0.05, 0.1, 0.15]]),
        (qd_score, [[1, 2, 3], [2, 4, 6]]),
        (best, [[0.5, 0.5, 0.5], [np.nan, 0.6, 0.6]]),
    ]
    for axes, expected in drawn:
        assert [line.get_label() for line in axes.lines] == list(TASKS)
        for line, values in zip(axes.lines, expected, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
            np.testing.assert_allclose(line.get_ydata(), values)
        assert axes.get_xlabel() == "generation"


def test_a_task_has_one_colour_in_all_panels_and_the_experts_a_dotted_line():
    figure = draw_curves(rows(2), TASKS, {"a": [0.4, 0.1], "b": [0.2, 0.7]})
    colours = {tuple(line.get_color() for line in axes.lines[:2]) for axes in figure.axes}
    assert len(colours) == 1
    dotted = [line for line in figure.axes[2].lines if line.get_linestyle() == ":"]
    assert [np.asarray(line.get_ydata())[0] for line in dotted] == [0.4, 0.7]


def test_a_line_under_another_shows_through():
    equal = [{**row, "best": [0.5, 0.5 if row["generation"] < 3 else 0.6]} for row in rows(3)]
    best = draw_curves(equal, TASKS).axes[2]
    (shown,) = best.lines[2:]
    np.testing.assert_array_equal(shown.get_xdata(), [1, 2])
    assert shown.get_color() == best.lines[0].get_color() != best.lines[1].get_color()


def test_of_three_equal_lines_each_is_seen():
    equal = [
        {"generation": g, **{name: [0.5] * 3 for name in ("coverage", "qd_score", "best")}}
        for g in range(1, 9)
    ]
    figure = draw_curves(equal, ("a", "b", "c"))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    # Without the legend below.
    panel = pixels[: int(0.8 * len(pixels))].reshape(-1, 3)
    for line in figure.axes[2].lines[:3]:
        colour = np.round(255 * np.array(to_rgb(line.get_color())))
        assert (np.abs(panel - colour).max(axis=1) <= 2).sum() > 50


def test_one_generation_is_enough(tmp_path):
    plot_curves(tmp_path / "curves.png", rows(1), TASKS)
    assert (tmp_path / "curves.png").stat().st_size > 5_000


def test_rows_that_lack_something_are_refused_by_number():
    with pytest.raises(ValueError, match="expected rows of metrics, found none"):
        draw_curves([], TASKS)
    short = [*rows(1), {"generation": 2, "coverage": [0.1]}]
    with pytest.raises(ValueError, match=r"metrics row 1: expected 'coverage' .* found \[0\.1\]"):
        draw_curves(short, TASKS)
