"""The archives against a slow dictionary, written from the rules alone."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.repertoire import CyclicRepertoire

BINS, BATCH = 3, 6
VALUES = [-5.0, 0.0, 0.25, 1.0, 1.25, 1.5, 2.0, 2.25, 3.0, 9.0, math.nan, math.inf, -math.inf]


@dataclasses.dataclass
class SlowArchives:
    """``archives[k][cell] = (number, scores)``; cells are tuples of bins of width 1 from 0 to 3."""

    archives: list[dict[tuple[int, ...], tuple[int, tuple[float, ...]]]]

    @staticmethod
    def bin(score):
        """Bins (0, 1], (1, 2], (2, 3], and what is outside belongs to the ends."""
        if score <= 1:
            return 0
        return 1 if score <= 2 else 2

    def offer(self, numbers, rows):
        for k, archive in enumerate(self.archives):
            champions: dict[tuple[int, ...], tuple[int, tuple[float, ...]]] = {}
            for number, row in zip(numbers, rows, strict=True):
                if not all(math.isfinite(s) for s in row):
                    continue
                cell = tuple(self.bin(s) for i, s in enumerate(row) if i != k)
                if cell not in champions or row[k] > champions[cell][1][k]:
                    champions[cell] = (number, row)
            for cell, challenger in champions.items():
                if cell not in archive or challenger[1][k] > archive[cell][1][k]:
                    archive[cell] = challenger

    @property
    def elites(self):
        return {number for archive in self.archives for number, _ in archive.values()}


def check_equal(repertoire, slow):
    tasks = repertoire.num_archives
    cells = np.asarray(repertoire.cells)
    ids = np.asarray(repertoire.genotypes["id"])
    copies = np.asarray(repertoire.extra_scores["note"])
    scores = np.asarray(repertoire.scores)
    for k in range(tasks):
        expected = np.full((BINS,) * (tasks - 1), -1)
        for cell, (number, row) in slow.archives[k].items():
            expected[cell] = number
            slot = cells[k].reshape(expected.shape)[cell]
            np.testing.assert_array_equal(scores[slot], row)
        found = np.where(cells[k] >= 0, ids[cells[k]], -1)
        np.testing.assert_array_equal(found, expected.ravel())
        np.testing.assert_array_equal(np.where(cells[k] >= 0, copies[cells[k], 0], -1), found)
    occupied = np.isin(np.arange(repertoire.capacity), cells)
    assert set(ids[occupied]) == slow.elites
    assert occupied.sum() == len(slow.elites)
    assert (scores[~occupied] == -np.inf).all()


def batch(numbers, rows):
    ids = jnp.asarray(numbers, jnp.int32)
    scores = jnp.asarray(rows, jnp.float32)
    return {"id": ids, "w": ids[:, None].astype(jnp.bfloat16)}, scores, {"note": ids[:, None]}


def empty_repertoire(tasks, capacity):
    """A repertoire made of one row that the slow model knows too."""
    genotypes, scores, extra = batch([0], [(0.5,) * tasks])
    grid = make_grid([0.0] * tasks, [3.0] * tasks, BINS)
    repertoire = CyclicRepertoire.init(
        genotypes, scores, scores, grid, extra, capacity=capacity, keys_extra_scores=("note",)
    )
    slow = SlowArchives([{} for _ in range(tasks)])
    slow.offer([0], [(0.5,) * tasks])
    return repertoire, slow


def histories(tasks):
    row = st.tuples(*[st.sampled_from(VALUES)] * tasks)
    return st.lists(st.lists(row, min_size=BATCH, max_size=BATCH), min_size=1, max_size=5)


@pytest.mark.parametrize("tasks", [2, 3, 4])
def test_any_history_gives_the_slow_models_archives(tasks):
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(histories(tasks))
    def check(history):
        repertoire, slow = empty_repertoire(tasks, capacity=2 if tasks == 2 else 7)
        for t, rows in enumerate(history):
            numbers = list(range(1 + t * BATCH, 1 + (t + 1) * BATCH))
            genotypes, scores, extra = batch(numbers, rows)
            before = repertoire.capacity
            repertoire = repertoire.add(genotypes, scores, scores, extra)
            slow.offer(numbers, rows)
            check_equal(repertoire, slow)
            # It grows only when it must, and by doubling.
            if repertoire.capacity > before:
                assert before < len(slow.elites) <= repertoire.capacity < 2 * len(slow.elites)

    check()


def test_compiled_insertion_agrees_with_the_slow_model():
    repertoire, slow = empty_repertoire(3, capacity=27)
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


def offered(rows, tasks=2):
    repertoire, _ = empty_repertoire(tasks, capacity=1)
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
