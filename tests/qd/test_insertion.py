"""The archives against a slow dictionary, written from the rules alone."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cycleqd_jax.qd.cvt import CVT
from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.repertoire import CyclicRepertoire

BINS, BATCH = 3, 6
VALUES = [-5.0, 0.0, 0.25, 1.0, 1.25, 1.5, 2.0, 2.25, 3.0, 9.0, math.nan, math.inf, -math.inf]


@dataclasses.dataclass
class SlowArchives:
    """``archives[k][cell] = (number, scores)``; ``cell_of(k, row)`` says where a row belongs."""

    cell_of: Callable[[int, tuple[float, ...]], int]
    archives: list[dict[int, tuple[int, tuple[float, ...]]]]

    def offer(self, numbers, rows):
        for k, archive in enumerate(self.archives):
            champions: dict[int, tuple[int, tuple[float, ...]]] = {}
            for number, row in zip(numbers, rows, strict=True):
                if not all(math.isfinite(s) for s in row):
                    continue
                cell = self.cell_of(k, row)
                if cell not in champions or row[k] > champions[cell][1][k]:
                    champions[cell] = (number, row)
            for cell, challenger in champions.items():
                if cell not in archive or challenger[1][k] > archive[cell][1][k]:
                    archive[cell] = challenger

    @property
    def elites(self):
        return {number for archive in self.archives for number, _ in archive.values()}


def grid_and_rule(tasks):
    """Bins (0, 1], (1, 2], (2, 3], and what is outside belongs to the ends."""

    def cell_of(k, row):
        cell = 0
        for i, score in enumerate(row):
            if i != k:
                cell = BINS * cell + (0 if score <= 1 else 1 if score <= 2 else 2)
        return cell

    return make_grid([0.0] * tasks, [3.0] * tasks, BINS), cell_of


def voronoi_and_rule(tasks):
    """Centres among points of a lattice, so that many rows are equally far from several."""
    rng = np.random.default_rng(tasks)
    centres = rng.choice([0.0, 0.5, 1.0, 2.0, 3.5], size=(tasks, 5, tasks - 1))

    def cell_of(k, row):
        inside = [min(max(score, 0.0), 4.0) for i, score in enumerate(row) if i != k]
        far = [sum((a - b) ** 2 for a, b in zip(inside, c, strict=True)) for c in centres[k]]
        return far.index(min(far))

    ends = jnp.zeros(tasks), jnp.full(tasks, 4.0)
    return CVT(*ends, jnp.asarray(centres, jnp.float32)), cell_of


KINDS: dict[str, Any] = {"grid": grid_and_rule, "voronoi": voronoi_and_rule}


def check_equal(repertoire, slow):
    cells = np.asarray(repertoire.cells)
    ids = np.asarray(repertoire.genotypes["id"])
    copies = np.asarray(repertoire.extra_scores["note"])
    scores = np.asarray(repertoire.scores)
    for k, archive in enumerate(slow.archives):
        expected = np.full(cells.shape[1], -1)
        for cell, (number, row) in archive.items():
            expected[cell] = number
            np.testing.assert_array_equal(scores[cells[k, cell]], row)
        found = np.where(cells[k] >= 0, ids[cells[k]], -1)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.where(cells[k] >= 0, copies[cells[k], 0], -1), found)
    occupied = np.isin(np.arange(repertoire.capacity), cells)
    assert set(ids[occupied]) == slow.elites
    assert occupied.sum() == len(slow.elites)
    assert (scores[~occupied] == -np.inf).all()


def batch(numbers, rows):
    ids = jnp.asarray(numbers, jnp.int32)
    scores = jnp.asarray(rows, jnp.float32)
    return {"id": ids, "w": ids[:, None].astype(jnp.bfloat16)}, scores, {"note": ids[:, None]}


def first_repertoire(tasks, capacity, kind="grid"):
    """A repertoire made of one row that the slow model knows too."""
    cells, rule = KINDS[kind](tasks)
    genotypes, scores, extra = batch([0], [(0.5,) * tasks])
    repertoire = CyclicRepertoire.init(
        genotypes, scores, scores, cells, extra, capacity=capacity, keys_extra_scores=("note",)
    )
    slow = SlowArchives(rule, [{} for _ in range(tasks)])
    slow.offer([0], [(0.5,) * tasks])
    return repertoire, slow


@st.composite
def histories(draw, tasks):
    """Batches of rows, half of the histories made of a few rows that come again and again."""
    row = st.tuples(*[st.sampled_from(VALUES)] * tasks)
    if draw(st.booleans()):
        row = st.sampled_from(draw(st.lists(row, min_size=1, max_size=4)))
    return draw(st.lists(st.lists(row, min_size=BATCH, max_size=BATCH), min_size=1, max_size=5))


@pytest.mark.parametrize(
    ("kind", "tasks", "examples"),
    [
        ("grid", 3, 10),
        ("voronoi", 2, 10),
        *[
            pytest.param(*case, 40, marks=pytest.mark.slow)
            for case in [("grid", 2), ("grid", 3), ("grid", 4), ("voronoi", 2), ("voronoi", 4)]
        ],
    ],
)
def test_any_history_gives_the_slow_models_archives(kind, tasks, examples):
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(histories(tasks))
    def check(history):
        repertoire, slow = first_repertoire(tasks, 2 if tasks == 2 else 7, kind)
        for t, rows in enumerate(history):
            numbers = list(range(1 + t * BATCH, 1 + (t + 1) * BATCH))
            genotypes, scores, extra = batch(numbers, rows)
            before = repertoire.capacity
            repertoire = repertoire.add(genotypes, scores, scores, extra)
            slow.offer(numbers, rows)
            check_equal(repertoire, slow)
            # It grows only when it must, and by doubling, at most to an elite a cell.
            if repertoire.capacity > before:
                assert before < len(slow.elites) <= repertoire.capacity
                assert repertoire.capacity <= min(2 * len(slow.elites) - 1, repertoire.cells.size)

    check()


@pytest.mark.parametrize("kind", ["grid", "voronoi"])
def test_compiled_insertion_agrees_with_the_slow_model(kind):
    repertoire, slow = first_repertoire(3, 27, kind)
    add: Any = jax.jit(lambda r, g, s, e: r.add(g, s, s, e))
    rng = np.random.default_rng(0)
    for t in range(20):
        numbers = list(range(1 + t * BATCH, 1 + (t + 1) * BATCH))
        rows = [tuple(r) for r in rng.choice(VALUES, size=(BATCH, 3))]
        genotypes, scores, extra = batch(numbers, rows)
        repertoire = add(repertoire, genotypes, scores, extra)
        slow.offer(numbers, rows)
        check_equal(repertoire, slow)
    assert add._cache_size() == 1


def test_ten_tasks_agree_with_the_slow_model():
    """More tasks than a grid could hold: 15 bins would be 15 ** 9 cells."""
    repertoire, slow = first_repertoire(10, 64, "voronoi")
    rng = np.random.default_rng(0)
    for t in range(8):
        numbers = list(range(1 + t * BATCH, 1 + (t + 1) * BATCH))
        rows = [tuple(r) for r in rng.choice(VALUES[:10], size=(BATCH, 10))]
        genotypes, scores, extra = batch(numbers, rows)
        repertoire = repertoire.add(genotypes, scores, scores, extra)
        slow.offer(numbers, rows)
        check_equal(repertoire, slow)


def offered(rows, tasks=2):
    repertoire, _ = first_repertoire(tasks, capacity=1)
    genotypes, scores, extra = batch(range(1, 1 + len(rows)), rows)
    return repertoire.add(genotypes, scores, scores, extra)


def holder(repertoire, k, cell):
    slot = int(repertoire.cells[k, cell])
    return int(repertoire.genotypes["id"][slot]) if slot >= 0 else None


def test_a_tie_keeps_the_incumbent():
    assert holder(offered([(0.5, 0.5)]), 0, 0) == 0


def test_the_first_of_equals_wins_inside_a_batch():
    repertoire = offered([(2.0, 2.5), (2.0, 2.5)])
    assert holder(repertoire, 0, 2) == 1
    assert int(repertoire.num_elites) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_never_enters_and_never_blocks(bad):
    repertoire = offered([(bad, 2.5), (2.9, bad), (0.1, 2.5)])
    assert holder(repertoire, 0, 2) == 3
    assert int(repertoire.num_elites) == 2
    assert holder(repertoire, 1, 2) is None


def test_a_genotype_is_stored_once_and_freed_with_its_last_cell():
    repertoire = offered([(0.6, 0.6)])
    assert int(repertoire.num_elites) == 1
    better, scores, extra = batch([9], [(0.7, 0.9)])
    repertoire = repertoire.add(better, scores, scores, extra)
    assert int(repertoire.num_elites) == 1
    assert holder(repertoire, 0, 0) == holder(repertoire, 1, 0) == 9
    assert repertoire.capacity <= 2
