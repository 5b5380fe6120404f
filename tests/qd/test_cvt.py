import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.qd.cvt import CVT, make_cvt
from cycleqd_jax.qd.tessellation import Tessellation, expert_ranges

LOWER, UPPER = [0.0, -1.0, 2.0, 0.0], [1.0, 1.0, 52.0, 10.0]


@pytest.fixture(scope="module")
def cvt():
    return make_cvt(LOWER, UPPER, 20, jax.random.key(0), num_samples=500)


def test_every_archive_has_its_cells_in_its_ranges(cvt):
    assert (cvt.num_tasks, cvt.num_cells, cvt.bins) == (4, 20, None)
    assert cvt.centres.shape == (4, 20, 3)
    assert cvt.centres.dtype == jnp.float32
    for k in range(4):
        lower, upper = cvt.bounds(k)
        np.testing.assert_array_equal(lower, np.delete(LOWER, k))
        np.testing.assert_array_equal(upper, np.delete(UPPER, k))
        centres = np.asarray(cvt.centroids(k))
        assert (centres > np.asarray(lower)).all()
        assert (centres < np.asarray(upper)).all()
        assert len(np.unique(centres, axis=0)) == 20


@pytest.mark.parametrize("k", [0, 2, 3])
def test_a_centre_falls_into_its_own_cell(cvt, k):
    scores = jnp.insert(cvt.centroids(k), k, 0.3, axis=1)
    np.testing.assert_array_equal(cvt.cell_of(scores, k), np.arange(20))


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_the_nearest_centre_decides_in_units_of_the_ranges(cvt, k):
    rng = np.random.default_rng(k)
    scores = rng.uniform(LOWER, UPPER, size=(200, 4)).astype(np.float32)
    span = np.delete(np.asarray(UPPER) - LOWER, k)
    gaps = (np.delete(scores, k, axis=1)[:, None] - np.asarray(cvt.centroids(k))) / span
    nearest = (gaps.astype(np.float64) ** 2).sum(axis=-1).argmin(axis=1)
    for function in (CVT.cell_of, jax.jit(CVT.cell_of)):
        np.testing.assert_array_equal(function(cvt, jnp.asarray(scores), jnp.int32(k)), nearest)


def test_it_is_a_tessellation(cvt):
    assert isinstance(cvt, Tessellation)


def test_centres_depend_on_nothing_but_the_arguments(cvt):
    again = make_cvt(LOWER, UPPER, 20, jax.random.key(0), num_samples=500)
    np.testing.assert_array_equal(again.centres, cvt.centres)
    other = make_cvt(LOWER, UPPER, 20, jax.random.key(1), num_samples=500)
    assert (other.centres != cvt.centres).any()


def test_cells_are_even():
    cells = make_cvt([0.0] * 3, [1.0] * 3, 16, jax.random.key(0), num_samples=4000)
    rows = jax.random.uniform(jax.random.key(1), (4000, 3))
    counts = np.bincount(np.asarray(jax.jit(CVT.cell_of)(cells, rows, 0)), minlength=16)
    assert counts.min() > 4000 / 16 / 2
    assert counts.max() < 4000 / 16 * 2


def line(*centres):
    """Two tasks from 0 to 1 with these centres in both archives."""
    points = jnp.broadcast_to(jnp.asarray(centres)[None, :, None], (2, len(centres), 1))
    return CVT(jnp.zeros(2), jnp.ones(2), points)


def test_a_tie_goes_to_the_lowest_index():
    middle = jnp.asarray([[9.0, 0.5]])
    assert int(line(0.25, 0.75).cell_of(middle, 0)[0]) == 0
    assert int(line(0.75, 0.25).cell_of(middle, 0)[0]) == 0
    assert int(line(0.0, 0.5, 0.5).cell_of(middle, 0)[0]) == 1


def test_scores_outside_count_as_the_ends_and_bad_ones_get_some_cell():
    outside = jnp.asarray([-3e38, -7.0, 7.0, 3e38, jnp.inf, -jnp.inf, jnp.nan])
    cells = line(0.25, 0.5, 0.75).cell_of(jnp.stack([outside, outside], axis=1), 1)
    np.testing.assert_array_equal(cells, [0, 0, 2, 2, 2, 0, 0])


def test_a_range_without_width_tells_no_cells_apart():
    cells = make_cvt([0.0, 0.5, 0.0], [1.0, 0.5, 1.0], 5, jax.random.key(0), num_samples=100)
    rows = jnp.asarray([[0.3, x, 0.6] for x in (-1.0, 0.5, 2.0)])
    found = cells.cell_of(rows, 0)
    assert (found == found[0]).all()
    assert np.isfinite(np.asarray(cells.centres)).all()


def test_two_tasks_and_ten():
    pair = make_cvt([0.0] * 2, [1.0] * 2, 4, jax.random.key(0), num_samples=200)
    assert sorted(pair.cell_of(jnp.asarray([[0.0, x / 4 + 0.125] for x in range(4)]), 0)) == [
        *range(4)
    ]
    ten = make_cvt([0.0] * 10, [1.0] * 10, 32, jax.random.key(0), num_samples=400)
    assert ten.centres.shape == (10, 32, 9)


def test_the_experts_give_the_ranges():
    lower, upper = expert_ranges([[0.8, 0.1], [0.2, 0.6]])
    cells = make_cvt(lower, upper, 3, jax.random.key(0), num_samples=50)
    np.testing.assert_allclose(cells.lower, [0.17, 0.085], rtol=1e-6)
    np.testing.assert_allclose(cells.upper, [0.92, 0.69], rtol=1e-6)


class TestBadInput:
    @pytest.mark.parametrize(
        ("lower", "upper", "message"),
        [
            ([0.0], [1.0], r"CVT lower must hold.*at least 2 tasks.*found shape \(1,\)"),
            ([0.0, 2.0], [1.0, 1.0], r"CVT of task 1: expected lower <= upper, found 2\.0 > 1"),
            ([0.0, 0.0], [1.0, np.nan], "CVT upper must be finite"),
            ([0.0, 0.0], [1.0] * 3, r"CVT lower and upper.*found \(2,\) and \(3,\)"),
        ],
    )
    def test_ranges(self, lower, upper, message):
        with pytest.raises(ValueError, match=message):
            make_cvt(lower, upper, 4, jax.random.key(0))

    def test_no_cells(self):
        with pytest.raises(ValueError, match="at least 1 cell, found 0"):
            make_cvt([0.0] * 2, [1.0] * 2, 0, jax.random.key(0))

    def test_fewer_samples_than_cells(self):
        with pytest.raises(ValueError, match="expected at least 8, one a cell, found 7"):
            make_cvt([0.0] * 2, [1.0] * 2, 8, jax.random.key(0), num_samples=7)
