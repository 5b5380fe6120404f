import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from qdax.utils.plotting import plot_multidimensional_map_elites_grid

from cycleqd_jax.qd.cvt import make_cvt
from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.plotting import plot_archive
from cycleqd_jax.qd.repertoire import CyclicRepertoire


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def repertoire_of(cells, rows):
    scores = jnp.asarray(rows, jnp.float32)
    return CyclicRepertoire.init(jnp.arange(len(rows)), scores, scores, cells)


def painted(axes, quality, low, high):
    """The centres of the regions in the colour of a quality."""
    colour = np.asarray(
        matplotlib.colormaps["viridis"](matplotlib.colors.Normalize(low, high)(quality))
    )
    return [
        np.mean(patch.get_xy()[:-1], axis=0)
        for patch in axes.patches
        if np.allclose(patch.get_facecolor()[:3], colour[:3]) and patch.get_alpha() == 0.8
    ]


def test_three_tasks_on_a_grid_are_a_map():
    grid = make_grid([0.0, 0.0, 10.0], [1.0, 1.0, 12.0], 4)
    # In archive 1 the axes are tasks 0 and 2; the second row lies outside the grid.
    axes = plot_archive(repertoire_of(grid, [(0.4, 0.2, 11.2), (9.0, 0.9, 3.0)]), 1)
    ((x, y),) = painted(axes, 0.2, 0.2, 0.9)
    assert (x, y) == pytest.approx((0.375, 11.25))
    assert len(axes.patches) == 16 + 2
    assert axes.get_xlim() == (0.0, 1.0)
    assert axes.get_ylim() == (10.0, 12.0)


def test_voronoi_cells_are_drawn_where_the_centres_are():
    cvt = make_cvt([0.0] * 3, [1.0] * 3, 30, jax.random.key(0), num_samples=300)
    rows = jax.random.uniform(jax.random.key(1), (8, 3))
    repertoire = repertoire_of(cvt, rows)
    axes = plot_archive(repertoire, 2, vmin=0.0, vmax=1.0)
    view = repertoire.archive(2)
    occupied = np.flatnonzero(np.asarray(view.fitnesses)[:, 0] > -np.inf)
    assert len(axes.patches) == 30 + len(occupied)
    for cell in occupied:
        patch = [
            p
            for p in axes.patches
            if p.get_alpha() == 0.8 and p.get_path().contains_point(view.centroids[cell])
        ]
        colour = matplotlib.colormaps["viridis"](float(view.fitnesses[cell, 0]))
        assert len(patch) == 1
        np.testing.assert_allclose(patch[0].get_facecolor()[:3], colour[:3])


@pytest.mark.parametrize("tasks", [2, *[pytest.param(n, marks=pytest.mark.slow) for n in (4, 5)]])
def test_other_numbers_of_tasks_are_nested_planes(tasks):
    # Edges, values outside and a range without width, which QDax's own binning gets wrong.
    lower, upper = [0.0, 0.0, -1.0, 0.5, 0.0][:tasks], [1.0, 2.0, 1.0, 0.5, 1.0][:tasks]
    grid = make_grid(lower, upper, 3)
    rows = np.asarray([[0.9, 9.0, -9.0, 0.5, 1.0], [0.8, 0.1, 0.9, 0.6, 0.1]], np.float32)
    repertoire = repertoire_of(grid, rows[:, :tasks])
    before = dict(matplotlib.rcParams)
    axes = plot_archive(repertoire, 0)
    assert dict(matplotlib.rcParams) == before
    drawn = np.asarray(axes.images[0].get_array().filled(np.nan)).T
    expected = np.full(drawn.shape, np.nan)
    for row in rows[:, :tasks]:
        cell = int(grid.cell_of(jnp.asarray(row)[None], 0)[0])
        bins = np.unravel_index(cell, (3,) * (tasks - 1))
        place = [0, 0]
        for i, number in enumerate(bins):
            place[i % 2] = 3 * place[i % 2] + int(number)
        expected[tuple(place)] = row[0]
    np.testing.assert_array_equal(drawn, expected)


def test_qdax_draws_an_archive_view_directly():
    grid = make_grid([0.0] * 4, [1.0] * 4, 3)
    rows = np.random.default_rng(0).uniform(size=(20, 4))
    view = repertoire_of(grid, rows).archive(3)
    _, axes = plot_multidimensional_map_elites_grid(view, np.zeros(3), np.ones(3), (3, 3, 3))
    drawn = axes.images[0].get_array().compressed()
    elites = np.asarray(view.fitnesses)[np.asarray(view.fitnesses) > -np.inf]
    np.testing.assert_array_equal(np.sort(drawn), np.sort(elites))


class TestBadInput:
    def test_no_such_archive(self):
        grid = make_grid([0.0] * 2, [1.0] * 2, 3)
        with pytest.raises(ValueError, match=r"archive in 0 \.\. 1, found 2"):
            plot_archive(repertoire_of(grid, [(0.1, 0.2)]), 2)

    def test_an_empty_archive(self):
        repertoire = repertoire_of(make_grid([0.0] * 2, [1.0] * 2, 3), [(0.1, 0.2)])
        with pytest.raises(ValueError, match="archive 1 is empty"):
            plot_archive(repertoire.replace(cells=jnp.full((2, 3), -1)), 1)

    def test_voronoi_cells_that_are_no_plane(self):
        cvt = make_cvt([0.0] * 4, [1.0] * 4, 5, jax.random.key(0), num_samples=50)
        with pytest.raises(ValueError, match=r"3 tasks \(a plane\), found 4"):
            plot_archive(repertoire_of(cvt, np.ones((2, 4))), 0)
