"""The family tree as it is printed."""

import io

import pytest
from rich.console import Console

from cycleqd_jax.runs.records.lineage import Birth, FamilyTree
from cycleqd_jax.runs.results.pedigree import draw_pedigree

HOW = {"weights": [1.25, 0.75], "expert": "shell", "keys": [[0, 1], [2, 3]]}
FAMILY = FamilyTree(
    [
        Birth(0, (), None, 0, {"a": 0.5, "b": 0.1}, {"expert": "coding"}),
        Birth(1, (), None, 0, {"a": 0.1, "b": 0.6}, {"expert": "shell"}),
        Birth(2, (0, 1), 0, 1, {"a": 0.4, "b": 0.3}, HOW),
        Birth(3, (2, 2), 1, 2, {"a": 0.4, "b": float("nan")}, HOW),
        Birth(4, (3, 2), 0, 3, {"a": 0.7, "b": 0.9}, HOW),
    ]
)


def shown(id: int, depth: int = 6) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=120).print(draw_pedigree(FAMILY, id, ("a", "b"), depth))
    return [line.rstrip() for line in text.getvalue().splitlines()]


def test_every_line_says_who_when_and_how() -> None:
    lines = shown(4)
    assert (
        lines[0] == "#4 generation 3, archive a 0.70 0.90 mean 0.800  = 1.25 a + 0.75 b along shell"
    )
    assert any(line.endswith("expert coding 0.50 0.10 mean 0.300") for line in lines)
    (again,) = [line for line in lines if "shown elsewhere" in line]
    assert "#2 " in again
    assert any("#3 " in line and "both parents:" in line and "nan" in line for line in lines)
    assert sum("#0 " in line for line in lines) == 1


def test_depth_ends_the_tree_and_says_what_is_left_out() -> None:
    lines = shown(4, depth=1)
    assert len(lines) == 3
    assert "#3 " in lines[1]
    assert "(3 ancestors not shown)" in lines[1]


def test_nobody_is_named() -> None:
    with pytest.raises(ValueError, match="no model has the id 9"):
        shown(9)
