"""What all pictures of a run share: fonts, colours, headings, legend, and how they are written.

Matplotlib's object interface is used throughout: no global figures, no change of global settings.
Colours are safe for colour-blind eyes: viridis for scores, the Okabe-Ito palette for tasks.
"""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from cycleqd_jax.atomic import atomic_file

Numbers = Any
"""Numbers in a row or table: lists, tuples, NumPy or JAX arrays."""

_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
INK = "#222222"
SOFT = "#666666"
STYLE: dict[str, Any] = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.axisbelow": True,
}


def task_colour(task: int) -> str:
    """The colour of task k in every picture of a run."""
    return _PALETTE[task % len(_PALETTE)]


def new_figure(
    width: float,
    height: float,
    headline: str,
    sentence: str = "",
    pads: tuple[float, float] = (0, 0),
) -> Figure:
    """A figure with a headline and a sentence at the top; its panels will lie below them.

    Args:
        width: inches.
        height: inches.
        headline: what the picture is.
        sentence: how to read it; wrapped to the width.
        pads: room around every panel beside and above it, in inches; (0, 0) takes the usual.
    """
    sentence = textwrap.fill(sentence, int(width * 11.5))  # characters of this size to the inch
    room = 0.6 + 0.2 * len(sentence.splitlines()) + (0.15 if sentence else 0)
    layout = ConstrainedLayoutEngine(
        rect=(0, 0, 1, 1 - room / height), w_pad=pads[0] or None, h_pad=pads[1] or None
    )
    figure = Figure(figsize=(width, height), layout=layout)
    top: dict[str, Any] = {"ha": "center", "va": "top", "in_layout": False}
    figure.text(0.5, 1 - 0.12 / height, headline, fontsize=17, fontweight="bold", **top)
    figure.text(0.5, 1 - 0.5 / height, sentence, fontsize=11, color=SOFT, **top)
    return figure


def legend(figure: Figure, handles: list[Any]) -> None:
    """Puts the legend below the panels, in as many lines as it needs."""
    columns = min(len(handles), int(figure.get_figwidth() / 1.9))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def heading(axes: Axes, text: str, explanation: str) -> None:
    """Writes a panel's heading and, below it in small, what the panel shows."""
    axes.set_title(text + "\n", loc="left", fontsize=13, fontweight="bold")
    below = axes.annotate(
        explanation, (0, 1), (0, 5), "axes fraction", "offset points", color=SOFT, fontsize=10
    )
    below.set_in_layout(False)  # it may be wider than its panel; the heading keeps the height free


def save_picture(figure: Figure, path: Path) -> None:
    """Writes the figure as a PNG, atomically.

    Raises:
        NoSpaceError: if the disk is full; an older picture stays.
    """
    with atomic_file(path) as temporary, matplotlib.rc_context(STYLE):
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")
