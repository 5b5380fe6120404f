"""What the archives of a run hold, to look at."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from cycleqd_jax.qd.insertion import EMPTY, incumbent_quality
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.runs.watching.drawing import (
    INK,
    STYLE,
    Numbers,
    heading,
    legend,
    new_figure,
    save_picture,
)

_MARKERS = "osD^vPX"
_EMPTY = "#E4E4E4"
_BEST = "#D62728"


@dataclass(frozen=True)
class ArchivePicture:
    """What `draw_archives` draws, in plain arrays.

    Attributes:
        quality: (K, cells) score of archive k's task in each cell, NaN where the cell is empty;
            row-major over the other tasks in task order, cells = bins ** (K - 1).
        bins: cells along an axis.
        lower: (K,) lowest score of the grid, per task.
        upper: (K,) highest score of the grid, per task.
        tasks: K names.
        experts: name to its K scores; drawn as marks.
        best: K scores of the model chosen in the end; drawn as a star.
        generations: how long the search ran, for the title.
    """

    quality: Numbers
    bins: int
    lower: Numbers
    upper: Numbers
    tasks: Sequence[str]
    experts: Mapping[str, Numbers] = field(default_factory=dict)
    best: Numbers = None
    generations: int | None = None

    def __post_init__(self) -> None:
        k = len(self.tasks)
        if k < 2:
            raise ValueError(f"tasks: expected two or more, found {list(self.tasks)}")
        cells = self.bins ** (k - 1)
        if np.shape(self.quality) != (k, cells):
            raise ValueError(f"quality: expected ({k}, {cells}), found {np.shape(self.quality)}")
        rows: dict[str, Any] = {"lower": self.lower, "upper": self.upper, **self.experts}
        if self.best is not None:
            rows["best"] = self.best
        for name, values in rows.items():
            if np.shape(values) != (k,):
                raise ValueError(f"{name}: expected {k} scores, found shape {np.shape(values)}")

    @classmethod
    def of(
        cls,
        repertoire: CyclicRepertoire,
        tasks: Sequence[str],
        *,
        experts: Mapping[str, Numbers],
        best: Numbers,
        generations: int,
    ) -> "ArchivePicture":
        """The picture of a repertoire on a grid."""
        grid, cells = repertoire.tessellation, np.asarray(repertoire.cells)
        quality = np.asarray(incumbent_quality(repertoire.scores, repertoire.cells))
        return cls(
            quality=np.where(cells == EMPTY, np.nan, quality),
            bins=grid.bins,
            lower=np.asarray(grid.lower),
            upper=np.asarray(grid.upper),
            tasks=tasks,
            experts=experts,
            best=best,
            generations=generations,
        )

    def edges(self, task: int) -> np.ndarray:
        """(bins + 1,) borders of the cells on a task's axis; a range of zero width is widened."""
        low, high = float(self.lower[task]), float(self.upper[task])
        if high <= low:
            low, high = low - 0.05, high + 0.05
        return np.linspace(low, high, self.bins + 1)

    def grid(self, archive: int) -> np.ndarray:
        """(bins,) * (K - 1) qualities, an axis for each other task in task order."""
        return np.asarray(self.quality[archive], float).reshape(
            (self.bins,) * (len(self.tasks) - 1)
        )

    def others(self, archive: int) -> list[int]:
        """The tasks that are the axes of an archive."""
        return [task for task in range(len(self.tasks)) if task != archive]

    def scale(self) -> Normalize:
        """The colours' range: all qualities there are."""
        values = np.asarray(self.quality, float)
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
        return Normalize(low, high) if high > low else Normalize(low - 0.05, high + 0.05)

    def places(self) -> Iterator[tuple[str, str, str, Numbers]]:
        """Label, marker, colour and scores of everything marked in the panels."""
        for i, (name, scores) in enumerate(self.experts.items()):
            yield f"expert {name}", _MARKERS[i % len(_MARKERS)], "white", scores
        if self.best is not None:
            yield "chosen model", "*", _BEST, self.best


def plot_archives(path: Path, picture: ArchivePicture) -> None:
    """Draws the archives and writes the PNG, atomically."""
    save_picture(draw_archives(picture), path)


def draw_archives(picture: ArchivePicture) -> Figure:
    """One panel an archive: bars for two tasks, a heat map for three, projections for more.

    A projection shows two of the other tasks; a cell's colour is the best quality over the rest.
    """
    k = len(picture.tasks)
    draw = {2: _draw_bars, 3: _draw_maps}.get(k, _draw_projections)
    with matplotlib.rc_context(STYLE):
        return draw(picture)


def _draw_maps(picture: ArchivePicture) -> Figure:
    sentence = (
        "A cell keeps the best model found with those two scores; its colour is the score on the "
        "archive's own task"
    )
    figure = _figure(picture, (14.2, 5.9), sentence, pads=(0.12, 0.08))
    panels = figure.subplots(1, 3)
    scale = picture.scale()
    for archive, axes in enumerate(panels):
        x, y = picture.others(archive)
        _map(axes, picture, picture.grid(archive), (x, y), scale, size=11.0)
        axes.set_xlabel(f"{picture.tasks[x]} score")
        axes.set_ylabel(f"{picture.tasks[y]} score")
        heading(axes, f"Archive of {picture.tasks[archive]}", _filling(picture, archive))
    _colour_bar(figure, list(panels), scale)
    return figure


def _draw_bars(picture: ArchivePicture) -> Figure:
    sentence = (
        "A bar is the best model found with that score on the other task; its height and colour "
        "are the score on the archive's own task"
    )
    figure = _figure(picture, (12.4, 5.2), sentence, pads=(0.12, 0.08))
    panels = figure.subplots(1, 2, sharey=True)
    scale = picture.scale()
    cmap = matplotlib.colormaps["viridis"]
    marked = [float(s) for *_, scores in picture.places() for s in scores if np.isfinite(s)]
    top = max([float(scale.vmax or 1.0), *marked]) * 1.08
    bottom = min([0.0, float(scale.vmin or 0.0), *marked])
    for archive, axes in enumerate(panels):
        other = picture.others(archive)[0]
        edges, quality = picture.edges(other), picture.grid(archive)
        filled = np.isfinite(quality)
        width = np.diff(edges)
        axes.bar(
            edges[:-1][~filled],
            top - bottom,
            width[~filled],
            bottom,
            align="edge",
            color=_EMPTY,
            edgecolor="white",
        )
        axes.bar(
            edges[:-1][filled],
            quality[filled],
            width[filled],
            align="edge",
            color=cmap(scale(quality[filled])),
            edgecolor="white",
        )
        _marks(axes, picture, (other, archive), 11.0, clip_y=False)
        axes.set(xlim=(edges[0], edges[-1]), ylim=(bottom, top))
        axes.set_xlabel(f"{picture.tasks[other]} score")
        axes.set_ylabel(f"{picture.tasks[archive]} score")
        axes.yaxis.set_tick_params(labelleft=True)
        _frame(axes)
        heading(axes, f"Archive of {picture.tasks[archive]}", _filling(picture, archive))
    _colour_bar(figure, list(panels), scale)
    return figure


def _draw_projections(picture: ArchivePicture) -> Figure:
    k = len(picture.tasks)
    pairs = list(itertools.combinations(range(k - 1), 2))
    side = 2.9 if k == 4 else 2.1
    size = ((side + 0.65) * len(pairs) + 1.4, (side + 0.95) * k + 1.6)
    sentence = (
        "A row is an archive seen along every pair of the other tasks' scores; a cell's colour is "
        "the best score on the archive's own task among all models there"
    )
    figure = _figure(picture, size, sentence, pads=(0.05, 0.12))
    panels = figure.subplots(k, len(pairs), squeeze=False)
    scale = picture.scale()
    for archive, row in enumerate(panels):
        others, grid = picture.others(archive), picture.grid(archive)
        for axes, (i, j) in zip(row, pairs, strict=True):
            rest = tuple(axis for axis in range(k - 1) if axis not in (i, j))
            seen = np.where(np.isfinite(grid), grid, -np.inf).max(axis=rest)
            shown = np.where(np.isfinite(seen), seen, np.nan)
            _map(axes, picture, shown, (others[i], others[j]), scale, size=8.0 if k == 4 else 6.5)
            axes.set_xlabel(picture.tasks[others[i]], fontsize=10, labelpad=1)
            axes.set_ylabel(picture.tasks[others[j]], fontsize=10, labelpad=1)
            axes.tick_params(labelsize=8)
        heading(row[0], f"Archive of {picture.tasks[archive]}", _filling(picture, archive))
    _colour_bar(figure, list(panels.flat), scale)
    return figure


def _map(
    axes: Axes,
    picture: ArchivePicture,
    values: np.ndarray,
    tasks: tuple[int, int],
    scale: Normalize,
    *,
    size: float,
) -> None:
    """Draws (bins, bins) values, first axis to the right, second upwards; NaN stays grey."""
    x, y = picture.edges(tasks[0]), picture.edges(tasks[1])
    axes.pcolormesh(
        x,
        y,
        np.ma.masked_invalid(values.T),
        cmap=matplotlib.colormaps["viridis"].with_extremes(bad=_EMPTY),
        norm=scale,
        edgecolors="white",
        linewidth=0.06 * size,
    )
    _marks(axes, picture, tasks, size)
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    axes.set_box_aspect(1)
    _frame(axes)


def _frame(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=3)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _marks(
    axes: Axes, picture: ArchivePicture, tasks: tuple[int, int], size: float, clip_y: bool = True
) -> None:
    x, y = picture.edges(tasks[0]), picture.edges(tasks[1])
    for label, marker, colour, scores in picture.places():
        # As in the grid: what lies outside belongs to the cell at the border.
        right = np.clip(float(scores[tasks[0]]), x[0], x[-1])
        up = float(scores[tasks[1]])
        up = np.clip(up, y[0], y[-1]) if clip_y else up
        axes.plot(
            right,
            up,
            marker=marker,
            ms=size * (1.7 if marker == "*" else 1.0),
            mfc=colour,
            mec="white" if marker == "*" else "black",
            mew=1.2,
            ls="none",
            label=label,
            clip_on=False,
            zorder=5,
        )


def _figure(
    picture: ArchivePicture, size: tuple[float, float], sentence: str, pads: tuple[float, float]
) -> Figure:
    """A figure with its headline, a sentence on how to read it, and the legend of the marks."""
    after = "" if picture.generations is None else f" after {picture.generations} generations"
    figure = new_figure(*size, f"What CycleQD found{after}", sentence, pads)
    handles: list[Any] = [
        Line2D([], [], ls="none", marker=mark, mfc=face, mec=edge, ms=ms, label=label)
        for label, mark, face, _ in picture.places()
        for edge, ms in [(face, 15) if mark == "*" else (INK, 11)]
    ]
    legend(figure, [*handles, Patch(facecolor=_EMPTY, label="empty cell")])
    return figure


def _filling(picture: ArchivePicture, archive: int) -> str:
    values = np.asarray(picture.quality[archive], float)
    filled = np.isfinite(values)
    best = f", best {values[filled].max():.2f}" if filled.any() else ""
    return f"{filled.sum():,} of {values.size:,} cells filled{best}"


def _colour_bar(figure: Figure, panels: list[Axes], scale: Normalize) -> None:
    bar = figure.colorbar(
        ScalarMappable(scale, "viridis"), ax=panels, shrink=0.8, aspect=26, pad=0.015
    )
    bar.set_label("score on the archive's own task")
    bar.outline.set_visible(False)
