"""How the search went: coverage, QD score and best scores over the generations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cycleqd_jax.runs.watching.drawing import (
    SOFT,
    STYLE,
    Numbers,
    heading,
    legend,
    new_figure,
    save_picture,
    task_colour,
)

# In widths of the line.
_DASH = 4
_PANELS = {
    "coverage": ("Coverage", "share of an archive's cells that hold a model"),
    "qd_score": ("QD score", "sum of the qualities in an archive"),
    "best": ("Best score", "on the search problems, per task"),
}


def plot_curves(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    tasks: Sequence[str],
    experts: Mapping[str, Numbers] | None = None,
) -> None:
    """Draws the curves and writes the PNG, atomically; see `draw_curves`."""
    save_picture(draw_curves(rows, tasks, experts), path)


def draw_curves(
    rows: Sequence[Mapping[str, Any]],
    tasks: Sequence[str],
    experts: Mapping[str, Numbers] | None = None,
) -> Figure:
    """Coverage, QD score and best score of every archive over the generations.

    Args:
        rows: rows of ``metrics.jsonl`` with ``generation`` and, per task (a list in task order or a
            mapping by name), ``coverage`` in [0, 1], ``qd_score`` and ``best``.
        tasks: K names.
        experts: name to its K scores; the best of them on each task is drawn as a dotted line.

    Raises:
        ValueError: if there are no rows or one lacks an entry.
    """
    if not rows:
        raise ValueError("curves: expected rows of metrics, found none")
    with matplotlib.rc_context(STYLE):
        x = np.array([row["generation"] for row in rows])
        figure = new_figure(13.2, 4.6, f"The search, generation by generation ({x[-1]} so far)")
        panels = figure.subplots(1, 3)
        for axes, (name, (title, explanation)) in zip(panels, _PANELS.items(), strict=True):
            values = _per_task(rows, name, tasks)
            for k, task in enumerate(tasks):
                mark = "o" if len(rows) == 1 else None
                axes.plot(x, values[:, k], color=task_colour(k), label=task, lw=2.2, marker=mark)
            _show_hidden(axes, x, values)
            heading(axes, title, explanation)
            axes.set_xlabel("generation")
            if name != "best" and np.nanmin(values, initial=0.0) >= 0:
                axes.set_ylim(bottom=0)
            axes.grid(axis="y", color="#DDDDDD", lw=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        handles: list[Any] = [
            Line2D([], [], color=task_colour(k), lw=3, label=t) for k, t in enumerate(tasks)
        ]
        if experts:
            for k in range(len(tasks)):
                own = max(float(scores[k]) for scores in experts.values())
                panels[2].axhline(own, color=task_colour(k), ls=":", lw=1.6)
            handles.append(
                Line2D([], [], color=SOFT, ls=":", lw=1.6, label="best expert on the task")
            )
        legend(figure, handles)
        return figure


def _show_hidden(axes: Axes, x: np.ndarray, values: np.ndarray) -> None:
    """Dashes of a task's colour where a later task's line runs over its own.

    Every task's are at places of their own, so that of any number of equal lines each is seen.
    """
    tasks = values.shape[1]
    for k in range(tasks - 1):
        dashes = (_DASH * k, (_DASH, _DASH * (tasks - 1)))
        hidden = np.flatnonzero((values[:, k + 1 :] == values[:, [k]]).any(axis=1))
        for run in np.split(hidden, np.flatnonzero(np.diff(hidden) > 1) + 1):
            if len(run) < 2:  # lines that cross
                continue
            axes.plot(x[run], values[run, k], color=task_colour(k), lw=2.2, ls=dashes)


def _per_task(rows: Sequence[Mapping[str, Any]], name: str, tasks: Sequence[str]) -> np.ndarray:
    """(rows, K) values of one entry; what is not finite becomes NaN and leaves a gap."""
    values = np.full((len(rows), len(tasks)), np.nan)
    for i, row in enumerate(rows):
        entry = row.get(name)
        if isinstance(entry, Mapping):
            entry = [entry.get(task) for task in tasks]
        if entry is None or len(entry) != len(tasks) or any(v is None for v in entry):
            raise ValueError(
                f"metrics row {i}: expected '{name}' with a value for each of {list(tasks)}, found "
                f"{row.get(name)!r}"
            )
        values[i] = entry
    return np.where(np.isfinite(values), values, np.nan)
