"""Dominated Novelty Search against a slow transcription of its rules, one pair at a time."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cycleqd_jax.qd.dns import (
    DominatedNoveltyRepertoire,
    compete,
    dominated_novelty,
    make_dominated_novelty,
)

BATCH, PLACES = 6, 5
VALUES = [-2.0, 0.0, 0.5, 1.0, 1.5, 2.0, 4.0, math.nan, math.inf, -math.inf]


class SlowArchives:
    """``archives[k][place] = (number, scores)`` or None; float32 where the rules round."""

    def __init__(self, tasks, places, neighbours):
        self.archives: list[list[Any]] = [[None] * places for _ in range(tasks)]
        self.neighbours = neighbours

    def novelty(self, candidates, k):
        def distance(a, b):
            total = np.float32(0)
            for i in range(len(a)):
                if i != k:
                    total += np.float32(a[i] - b[i]) ** 2
            return np.sqrt(total)

        found = []
        for i, (_, mine) in enumerate(candidates):
            far = sorted(
                distance(mine, other)
                for j, (_, other) in enumerate(candidates)
                if other[k] > mine[k] or (other[k] == mine[k] and j < i)
            )[: self.neighbours]
            total = np.float32(0)
            for d in far:
                total += d
            found.append(total / np.float32(len(far)) if far else np.float32(np.inf))
        return found

    def offer(self, numbers, rows):
        for k, archive in enumerate(self.archives):
            old = [entry for entry in archive if entry is not None]
            new = [
                (number, row)
                for number, row in zip(numbers, rows, strict=True)
                if all(math.isfinite(s) for s in row)
            ]
            candidates = old + new
            novelty = self.novelty(candidates, k)
            ranking = sorted(
                range(len(candidates)), key=lambda i: (-novelty[i], -candidates[i][1][k], i)
            )
            alive = {candidates[i][0] for i in ranking[: len(archive)]}
            for place, entry in enumerate(archive):
                if entry is not None and entry[0] not in alive:
                    archive[place] = None
            for entry in new:
                if entry[0] in alive:
                    archive[archive.index(None)] = entry

    @property
    def elites(self):
        return {entry[0] for archive in self.archives for entry in archive if entry is not None}


def batch(numbers, rows):
    ids = jnp.asarray(numbers, jnp.int32)
    scores = jnp.asarray(rows, jnp.float32)
    return {"id": ids, "w": ids[:, None].astype(jnp.bfloat16)}, scores, {"note": ids[:, None]}


def start(tasks, places=PLACES, neighbours=2, capacity=None):
    rule = make_dominated_novelty(tasks, places, neighbours)
    genotypes, scores, extra = batch([0], [(0.5,) * tasks])
    repertoire = DominatedNoveltyRepertoire.init(
        genotypes, scores, scores, rule, extra, capacity=capacity, keys_extra_scores=("note",)
    )
    slow = SlowArchives(tasks, places, neighbours)
    slow.offer([0], [(0.5,) * tasks])
    return repertoire, slow


def check_equal(repertoire, slow):
    cells = np.asarray(repertoire.cells)
    ids = np.asarray(repertoire.genotypes["id"])
    notes = np.asarray(repertoire.extra_scores["note"])
    for k, archive in enumerate(slow.archives):
        expected = [-1 if entry is None else entry[0] for entry in archive]
        found = np.where(cells[k] >= 0, ids[cells[k]], -1)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.where(cells[k] >= 0, notes[cells[k], 0], -1), expected)
        for place, entry in enumerate(archive):
            if entry is not None:
                np.testing.assert_array_equal(repertoire.scores[cells[k, place]], entry[1])
    occupied = np.isin(np.arange(repertoire.capacity), cells)
    assert set(ids[occupied]) == slow.elites
    assert occupied.sum() == len(slow.elites)
    assert (np.asarray(repertoire.scores)[~occupied] == -np.inf).all()


@st.composite
def histories(draw, tasks):
    row = st.tuples(*[st.sampled_from(VALUES)] * tasks)
    if draw(st.booleans()):
        row = st.sampled_from(draw(st.lists(row, min_size=1, max_size=4)))
    return draw(st.lists(st.lists(row, min_size=BATCH, max_size=BATCH), min_size=1, max_size=5))


@pytest.mark.parametrize(
    ("tasks", "examples"),
    [(2, 10), *[pytest.param(tasks, 40, marks=pytest.mark.slow) for tasks in (2, 4)]],
)
def test_any_history_gives_the_slow_models_archives(tasks, examples):
    # With two neighbours a mean of float32 distances rounds the same in any order of adding.
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(histories(tasks))
    def check(history):
        repertoire, slow = start(tasks, capacity=2 if tasks == 2 else None)
        for t, rows in enumerate(history):
            numbers = list(range(1 + t * BATCH, 1 + (t + 1) * BATCH))
            genotypes, scores, extra = batch(numbers, rows)
            repertoire = repertoire.add(genotypes, scores, scores, extra)
            slow.offer(numbers, rows)
            check_equal(repertoire, slow)

    check()


@pytest.mark.parametrize(
    ("tasks", "places", "neighbours"),
    [(3, 12, 3), pytest.param(10, 7, 4, marks=pytest.mark.slow), (2, 3, 50)],
)
def test_long_compiled_runs_agree_with_the_slow_model(tasks, places, neighbours):
    repertoire, slow = start(tasks, places, neighbours)
    add: Any = jax.jit(lambda r, g, s, e: r.add(g, s, s, e))
    rng = np.random.default_rng(tasks)
    for t in range(8):
        numbers = list(range(1 + t * BATCH, 1 + (t + 1) * BATCH))
        rows = [tuple(map(float, r)) for r in rng.uniform(size=(BATCH, tasks)).astype(np.float32)]
        genotypes, scores, extra = batch(numbers, rows)
        repertoire = add(repertoire, genotypes, scores, extra)
        slow.offer(numbers, rows)
        check_equal(repertoire, slow)
    assert add._cache_size() == 1


def test_novelty_by_hand():
    # In falling order: the best; 3 away; 1 from the second; 4, 1 and 2 from three better ones.
    novelty = dominated_novelty(jnp.asarray([[0.0], [3.0], [2.0], [4.0]]), 2)
    np.testing.assert_array_equal(novelty, [np.inf, 3.0, 1.5, 1.5])
    np.testing.assert_array_equal(dominated_novelty(jnp.ones((1, 1)), 3), [np.inf])


def offered(rows, places):
    repertoire, _ = start(2, places, 1)
    rows = [*rows, (math.nan, 0.0)][:3]
    genotypes, scores, extra = batch(range(1, 4), rows)
    after = repertoire.add(genotypes, scores, scores, extra)
    ids = np.asarray(after.genotypes["id"])
    return [set(ids[c[c >= 0]].tolist()) for c in np.asarray(after.cells)]


def test_a_tie_keeps_the_incumbent_and_copies_go_first():
    assert offered([(0.5, 0.5), (0.5, 0.5)], places=1) == [{0}, {0}]
    # Two equal best models must not drive each other out, nor both count as unbeaten.
    assert offered([(2.0, 2.0), (2.0, 2.0), (0.4, 9.0)], places=2) == [{1, 3}, {1, 3}]


def test_being_different_beats_being_good():
    # In archive 0, row 2 is better than row 1 but close to row 3, which is better still.
    survivors = offered([(0.1, 9.0), (2.8, 1.1), (3.0, 1.0)], places=2)[0]
    assert survivors == {3, 1}


def test_the_scale_is_the_unit_of_distance():
    rows = jnp.asarray([[3.0, 0.0, 0.0], [2.0, 9.0, 0.0], [1.0, 0.0, 1.0]])

    def kept(scale):
        rule = make_dominated_novelty(3, 2, 1, scale)
        after = DominatedNoveltyRepertoire.init({"id": jnp.arange(3)}, rows, rows, rule)
        return set(np.asarray(after.genotypes["id"])[np.asarray(after.cells[0])].tolist())

    assert kept(1.0) == {0, 1}
    assert kept([1.0, 90.0, 1.0]) == {0, 2}


def test_an_archive_never_loses_its_best_and_stays_full():
    repertoire, _ = start(3, places=4)
    best = np.full(3, 0.5)
    for seed in range(10):
        scores = jax.random.normal(jax.random.key(seed), (BATCH, 3))
        best = np.maximum(best, np.asarray(scores).max(axis=0))
        genotypes, _, extra = batch(range(BATCH), scores)
        repertoire = repertoire.add(genotypes, scores, scores, extra)
        cells = np.asarray(repertoire.cells)
        assert (cells >= 0).all()
        quality = np.asarray(repertoire.scores)[cells, np.arange(3)[:, None]]
        np.testing.assert_array_equal(quality.max(axis=1), best.astype(np.float32))


def test_an_elite_is_the_centre_of_its_own_place():
    view = start(3)[0].archive(1)
    assert view.bins is None
    np.testing.assert_array_equal(view.centroids, view.descriptors)


def test_many_batches_compile_once():
    compiled: Any = compete
    compiled.clear_cache()
    repertoire, _ = start(2)
    for seed in range(4):
        scores = jax.random.uniform(jax.random.key(seed), (BATCH, 2))
        genotypes, _, extra = batch(range(BATCH), scores)
        repertoire = repertoire.add(genotypes, scores, scores, extra)
    assert compiled._cache_size() == 2  # the first row alone, then every batch


class TestBadInput:
    def test_one_task(self):
        with pytest.raises(ValueError, match=r"at least 2 tasks.*found 1"):
            make_dominated_novelty(1, 10)

    @pytest.mark.parametrize("name", ["num_cells", "neighbours"])
    def test_no_places_or_neighbours(self, name):
        numbers = {"num_cells": 4, "neighbours": 3, name: 0}
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, found 0"):
            make_dominated_novelty(2, **numbers)

    def test_scale(self):
        with pytest.raises(ValueError, match=r"one number or 2, one a task, found shape \(3,\)"):
            make_dominated_novelty(2, 4, scale=[1.0, 1.0, 1.0])
        with pytest.raises(ValueError, match=r"finite and positive, found .*0"):
            make_dominated_novelty(2, 4, scale=[1.0, 0.0])

    def test_something_else_than_the_competition(self):
        scores, other = jnp.ones((1, 2)), jnp.ones((4, 1))
        with pytest.raises(ValueError, match=r"expected a DominatedNovelty.*found ArrayImpl"):
            DominatedNoveltyRepertoire.init({"id": jnp.arange(1)}, scores, scores, other)
