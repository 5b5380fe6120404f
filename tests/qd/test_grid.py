import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.qd.grid import Grid, bins_of, grid_from_experts, make_grid


def test_bins_are_open_below_and_closed_above():
    grid = make_grid([0.0, 0.0], [1.0, 1.0], 4)
    scores = jnp.asarray([-9.0, 0.0, 0.1, 0.25, 0.2500001, 0.5, 0.75, 0.76, 1.0, 9.0])
    bins = bins_of(grid, jnp.stack([scores, scores], axis=1))
    np.testing.assert_array_equal(bins[:, 0], [0, 0, 0, 0, 1, 1, 2, 3, 3, 3])


@pytest.mark.parametrize("bins", [3, 7, 15])
def test_every_inner_edge_belongs_to_the_bin_below_in_compiled_code_too(bins):
    grid = make_grid([0.1, -2.3], [0.7, 1.9], bins)
    scores = grid.edges.T
    expected = np.arange(bins - 1)
    for function in (bins_of, jax.jit(bins_of)):
        np.testing.assert_array_equal(function(grid, scores)[:, 0], expected)
        np.testing.assert_array_equal(function(grid, scores)[:, 1], expected)
        above = jnp.nextafter(scores, jnp.full_like(scores, jnp.inf))
        np.testing.assert_array_equal(function(grid, above)[:, 0], expected + 1)


def test_an_empty_range_has_a_first_and_a_last_bin():
    grid = make_grid([0.5, 0.0], [0.5, 1.0], 5)
    scores = jnp.asarray([[0.4, 0.0], [0.5, 0.0], [0.6, 0.0]])
    np.testing.assert_array_equal(bins_of(grid, scores)[:, 0], [0, 0, 4])


@pytest.mark.parametrize("tasks", [2, 3, 4])
def test_cells_are_row_major_over_the_other_tasks(tasks):
    bins = 3
    grid = make_grid([0.0] * tasks, [3.0] * tasks, bins)
    rows = np.asarray(list(itertools.product(range(bins), repeat=tasks)))
    scores = jnp.asarray(rows + 0.5, jnp.float32)
    for k in range(tasks):
        others = np.delete(rows, k, axis=1)
        expected = np.ravel_multi_index(tuple(others.T), (bins,) * (tasks - 1))
        np.testing.assert_array_equal(grid.cell_of(scores, k), expected)
        np.testing.assert_array_equal(jax.jit(Grid.cell_of)(grid, scores, jnp.int32(k)), expected)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_centroid_falls_into_its_own_cell(k):
    grid = make_grid([0.0, -1.0, 2.0], [1.0, 1.0, 5.0], 4)
    centres = grid.centroids(k)
    assert centres.shape == (16, 2)
    scores = jnp.insert(centres, k, 0.3, axis=1)
    np.testing.assert_array_equal(grid.cell_of(scores, k), np.arange(16))


def test_bounds_leave_out_the_archives_own_task():
    lower, upper = make_grid([0.0, 1.0, 2.0], [3.0, 4.0, 5.0], 2).bounds(1)
    np.testing.assert_array_equal(lower, [0.0, 2.0])
    np.testing.assert_array_equal(upper, [3.0, 5.0])


def test_grid_from_experts_spans_weakest_to_best():
    grid = grid_from_experts([[0.8, 0.1, -1.0], [0.2, 0.6, -2.0]], bins=15)
    np.testing.assert_allclose(grid.lower, [0.17, 0.085, -2.0 / 0.85], rtol=1e-6)
    np.testing.assert_allclose(grid.upper, [0.92, 0.69, -1.0 / 1.15], rtol=1e-6)
    assert (grid.num_cells, grid.num_tasks) == (225, 3)


def test_experts_that_score_nothing_are_legal():
    grid = grid_from_experts([[0.0, 0.5], [0.0, 0.6]], bins=3)
    np.testing.assert_array_equal(
        bins_of(grid, jnp.asarray([[0.0, 0.5], [0.1, 0.5]]))[:, 0], [0, 2]
    )


class TestBadInput:
    def test_one_task(self):
        with pytest.raises(ValueError, match=r"at least 2 tasks.*found shape \(1,\)"):
            make_grid([0.0], [1.0], 3)

    def test_ends_out_of_order(self):
        with pytest.raises(ValueError, match=r"grid of task 1: expected lower <= upper.*2\.0 > 1"):
            make_grid([0.0, 2.0], [1.0, 1.0], 3)

    def test_ends_not_finite(self):
        with pytest.raises(ValueError, match="upper must be finite"):
            make_grid([0.0, 0.0], [1.0, np.inf], 3)

    def test_shapes_that_differ(self):
        with pytest.raises(ValueError, match=r"one shape, found \(2,\) and \(3,\)"):
            make_grid([0.0, 0.0], [1.0] * 3, 3)

    def test_no_bins(self):
        with pytest.raises(ValueError, match="at least 1 bin per task, found 0"):
            make_grid([0.0, 0.0], [1.0, 1.0], 0)

    def test_too_many_cells(self):
        with pytest.raises(ValueError, match="use fewer bins"):
            make_grid([0.0] * 10, [1.0] * 10, 15)

    def test_expert_scores_of_wrong_shape(self):
        with pytest.raises(ValueError, match=r"\(experts, tasks\), found \(2,\)"):
            grid_from_experts([0.1, 0.2])
