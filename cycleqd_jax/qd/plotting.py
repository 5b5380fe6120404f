"""QDax's pictures of one archive. Needs matplotlib; nothing else in this room imports it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
from qdax.utils import plotting

from cycleqd_jax.qd.grid import Grid, make_grid
from cycleqd_jax.qd.repertoire import CyclicRepertoire


def plot_archive(
    repertoire: CyclicRepertoire,
    k: int,
    ax: Any = None,
    vmin: float | None = None,
    vmax: float | None = None,
) -> Any:
    """Draw archive k with QDax's plots.

    Three tasks: ``plot_2d_map_elites_repertoire``, the cells as Voronoi regions (for a ``CVT``
    exact if the two tasks' ranges are equally wide, as QDax measures distance unscaled). Any other
    number, for a ``Grid``: ``plot_multidimensional_map_elites_grid``, where the axes of the plane
    nest the tasks: the first and second task are the large squares, the third and fourth divide
    them, and so on.

    Args:
        repertoire: the archives.
        k: which one; it must hold an elite.
        ax: axes to draw in; None makes a figure with pyplot.
        vmin: quality at the lower end of the colours; None: the archive's worst.
        vmax: quality at the upper end; None: its best.

    Returns:
        The axes.

    Raises:
        ValueError: no such archive, an empty one, or a ``CVT`` with another number of tasks than
            three.
    """
    cells, tasks = repertoire.tessellation, repertoire.num_archives
    if not 0 <= k < tasks:
        raise ValueError(f"expected an archive in 0 .. {tasks - 1}, found {k}")
    view = repertoire.archive(k)
    if not np.isfinite(np.asarray(view.fitnesses)).any():
        raise ValueError(f"archive {k} is empty: there is nothing to draw")
    if tasks != 3 and not isinstance(cells, Grid):
        raise ValueError(
            f"Voronoi cells can be drawn for 3 tasks (a plane), found {tasks}: use a Grid"
        )
    # QDax sets global parameters of matplotlib.
    with matplotlib.rc_context():
        if tasks == 3:
            lower, upper = (np.asarray(end) for end in cells.bounds(k))
            with _voronoi_for_numpy_2():
                return plotting.plot_2d_map_elites_repertoire(
                    np.asarray(view.centroids), view.fitnesses, lower, upper, None, ax, vmin, vmax
                )[1]
        # QDax bins the descriptors itself, [lo, hi) and without ends; centres fall into the cell
        # that holds the elite. It divides by the ranges' widths.
        low, high = np.asarray(cells.lower), np.asarray(cells.upper)
        shown = make_grid(low, np.where(high > low, high, low + 0.1), cells.bins)
        view = view.replace(descriptors=shown.centroids(k))
        lower, upper = (np.asarray(end) for end in shown.bounds(k))
        bins = (cells.bins,) * (tasks - 1)
        return plotting.plot_multidimensional_map_elites_grid(
            view, lower, upper, bins, ax, vmin, vmax
        )[1]


@contextlib.contextmanager
def _voronoi_for_numpy_2() -> Iterator[None]:
    """Give QDax's Voronoi regions their radius: QDax 0.5 finds it by a method NumPy 2 dropped."""
    regions = plotting.get_voronoi_finite_polygons_2d
    plotting.get_voronoi_finite_polygons_2d = lambda points: regions(
        points, radius=10 * np.ptp(points)
    )
    try:
        yield
    finally:
        plotting.get_voronoi_finite_polygons_2d = regions
