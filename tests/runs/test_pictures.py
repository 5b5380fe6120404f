import itertools
import math
import os
import struct

import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from cycleqd_jax.atomic import NoSpaceError
from cycleqd_jax.runs.watching import pictures
from cycleqd_jax.runs.watching.pictures import ArchivePicture, draw_archives, plot_archives

NAMES = ("coding", "database", "shell", "os", "web")
BINS = 4


def picture(k, seed=0, filled=0.5, **changes):
    random = np.random.default_rng(seed)
    quality = random.uniform(size=(k, BINS ** (k - 1)))
    quality[random.uniform(size=quality.shape) > filled] = np.nan
    values = {
        "quality": quality,
        "bins": BINS,
        "lower": np.linspace(0.1, 0.2, k),
        "upper": np.linspace(0.8, 0.9, k),
        "tasks": NAMES[:k],
        "experts": {n: random.uniform(0.2, 0.8, k) for n in NAMES[:k]},
        "best": np.full(k, 0.7),
        "generations": 12,
    }
    return ArchivePicture(**{**values, **changes})


def meshes(figure):
    """The heat map of every panel that has one, with its panel."""
    return [
        (axes, mesh)
        for axes in figure.axes
        for mesh in axes.collections
        if isinstance(mesh, QuadMesh) and axes.get_xlabel()
    ]


def texts(figure):
    return " ".join(text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text")))


def test_three_tasks_each_map_shows_its_archive_with_real_score_ranges():
    shown = picture(3)
    figure = draw_archives(shown)
    maps = meshes(figure)
    assert len(maps) == 3
    for k, (axes, mesh) in enumerate(maps):
        x, y = (t for t in range(3) if t != k)
        drawn = mesh.get_array()  # rows upwards, columns to the right
        expected = shown.quality[k].reshape(BINS, BINS).T
        np.testing.assert_array_equal(np.ma.filled(drawn, np.nan), expected)
        assert axes.get_xlabel() == f"{NAMES[x]} score"
        assert axes.get_ylabel() == f"{NAMES[y]} score"
        assert axes.get_xlim() == pytest.approx((shown.lower[x], shown.upper[x]))
        assert axes.get_ylim() == pytest.approx((shown.lower[y], shown.upper[y]))
        assert mesh.norm is maps[0][1].norm  # one scale of colours
    assert "What CycleQD found after 12 generations" in texts(figure)
    filled = np.isfinite(shown.quality[0]).sum()
    assert f"{filled} of 16 cells filled, best {np.nanmax(shown.quality[0]):.2f}" in texts(figure)


def test_marks_lie_at_the_scores_and_outside_ones_at_the_border():
    shown = picture(3, experts={"wild": [5.0, -1.0, 0.5]}, best=[0.3, 0.4, 0.5])
    (axes, _), *_ = meshes(draw_archives(shown))
    places = {line.get_label(): line.get_xydata()[0].tolist() for line in axes.lines}
    assert places == {
        "expert wild": pytest.approx([shown.lower[1], 0.5]),
        "chosen model": pytest.approx([0.4, 0.5]),
    }


def test_two_tasks_are_bars_of_the_quality():
    shown = picture(2)
    figure = draw_archives(shown)
    for k in range(2):
        axes = figure.axes[k]
        grey, coloured = axes.containers
        filled = np.isfinite(shown.quality[k])
        assert len(grey) == (~filled).sum()
        assert [bar.get_height() for bar in coloured] == pytest.approx(
            shown.quality[k][filled].tolist()
        )
        assert [bar.get_x() for bar in coloured] == pytest.approx(
            shown.edges(1 - k)[:-1][filled].tolist()
        )


@pytest.mark.parametrize("k", [4, 5])
def test_more_tasks_are_the_maximum_along_every_pair(k):
    shown = picture(k, filled=0.1)
    maps = meshes(draw_archives(shown))
    assert len(maps) == k * math.comb(k - 1, 2)
    panels = iter(maps)
    for archive in range(k):
        others = [t for t in range(k) if t != archive]
        grid = shown.quality[archive].reshape((BINS,) * (k - 1))
        for i, j in itertools.combinations(range(k - 1), 2):
            axes, mesh = next(panels)
            expected = np.full((BINS, BINS), np.nan)
            for cell in np.ndindex(grid.shape):
                expected[cell[j], cell[i]] = np.fmax(expected[cell[j], cell[i]], grid[cell])
            np.testing.assert_array_equal(np.ma.filled(mesh.get_array(), np.nan), expected)
            assert (axes.get_xlabel(), axes.get_ylabel()) == (NAMES[others[i]], NAMES[others[j]])


@pytest.mark.parametrize("k", [2, 3, 4])
def test_empty_archives_flat_ranges_and_unfinished_scores_are_drawn(tmp_path, k):
    shown = picture(
        k,
        filled=0.0,
        upper=np.linspace(0.1, 0.2, k),
        experts={"lost": [np.nan] * k},
        best=None,
        generations=None,
    )
    plot_archives(tmp_path / "archives.png", shown)
    assert (tmp_path / "archives.png").stat().st_size > 5_000


def test_the_file_is_a_png_of_the_figures_size(tmp_path):
    path = tmp_path / "archives.png"
    plot_archives(path, picture(3))
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24]) == (1846, 767)
    assert os.listdir(tmp_path) == ["archives.png"]


def test_an_old_picture_survives_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "archives.png"
    path.write_bytes(b"old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures.Figure, "savefig", full)
    with pytest.raises(NoSpaceError, match=r"archives\.png"):
        plot_archives(path, picture(2))
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["coding"]}, "tasks: expected two or more"),
        ({"bins": 5}, r"quality: expected \(3, 25\), found \(3, 16\)"),
        ({"lower": np.zeros(2)}, r"lower: expected 3 scores, found shape \(2,\)"),
        ({"experts": {"odd": [0.1]}}, r"odd: expected 3 scores, found shape \(1,\)"),
        ({"best": [0.1, 0.2]}, r"best: expected 3 scores, found shape \(2,\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        picture(3, **changes)
