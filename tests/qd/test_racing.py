"""Racing against full evaluation: the bound changes nothing, the belief keeps its promise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.racing import (
    Belief,
    believe,
    can_enter,
    chance_of_entering,
    draw_finals,
    final_range,
    informative_order,
)
from cycleqd_jax.qd.repertoire import CyclicRepertoire

PROBLEMS, BATCH = 8, 6


def random_table(dice: np.random.Generator, rows: int, tasks: int, fractions: bool) -> np.ndarray:
    """(rows, tasks, PROBLEMS) results; skills differ, so that some children are hopeless."""
    skill = dice.beta(0.7, 0.7, (rows, tasks, 1))
    drawn = dice.random((rows, tasks, PROBLEMS))
    solved = (drawn < skill).astype(np.float32)
    return np.where(drawn > 0.8, np.float32(1 / 3), solved) if fractions else solved


def known(table: np.ndarray, count: int) -> np.ndarray:
    return np.where(np.arange(table.shape[-1]) < count, table, np.float32(np.nan))


def ends(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ranges = [final_range(table[:, k]) for k in range(table.shape[1])]
    lower, upper = (np.stack(end, axis=1) for end in zip(*ranges, strict=True))
    return lower, upper


def offer(
    repertoire: CyclicRepertoire, numbers: np.ndarray, scores: np.ndarray
) -> CyclicRepertoire:
    batch = jnp.asarray(scores)
    return repertoire.add(jnp.asarray(numbers), batch, batch)


def begin(grid: object, scores: np.ndarray) -> CyclicRepertoire:
    batch = jnp.asarray(scores, jnp.float32)
    return CyclicRepertoire.init(jnp.arange(len(scores), dtype=jnp.int32), batch, batch, grid)


@pytest.mark.parametrize(
    ("tasks", "bins"), [(3, 3), *[pytest.param(2, bins, marks=pytest.mark.slow) for bins in (1, 4)]]
)
def test_with_the_bound_archives_are_those_of_full_evaluation(tasks: int, bins: int) -> None:
    stopped = 0
    for seed in range(10):
        dice = np.random.default_rng(seed)
        fractions, block = bool(seed % 2), int(dice.integers(1, 5))
        # Ranges inside [0, 1], so that the end bins take what lies outside; some are a point.
        lower = dice.uniform(0.0, 0.5, tasks)
        grid = make_grid(lower, lower + (seed % 3) * dice.uniform(0.1, 0.2, tasks), bins)
        full = raced = begin(grid, random_table(dice, 4, tasks, fractions).mean(axis=2))
        for generation in range(6):
            table = random_table(dice, BATCH, tasks, fractions)
            racing = np.ones(BATCH, bool)
            for count in range(block, PROBLEMS, block):
                state = np.asarray(raced.scores), np.asarray(raced.cells)
                racing &= can_enter(grid, *state, *ends(known(table, count)))
            numbers = np.arange(BATCH, dtype=np.int32) + 4 + BATCH * generation
            scores = table.mean(axis=2)
            full = offer(full, numbers, scores)
            raced = offer(raced, numbers, np.where(racing[:, None], scores, np.float32(np.nan)))
            stopped += int((~racing).sum())
        # Slots too: ties of a later selection are broken by their order.
        assert jax.tree.all(jax.tree.map(np.array_equal, full, raced))
    assert stopped > 30


def test_the_bound_stops_exactly_those_that_no_rest_could_bring_in() -> None:
    # Against every completion of what is known, each offered as a child of its own.
    dice = np.random.default_rng(0)
    corners = np.array(list(itertools.product([0.1, 0.5, 0.9], repeat=2)), np.float32)
    grid = make_grid([0.0, 0.0], [1.0, 1.0], 3)
    repertoire = begin(grid, corners)
    state = np.asarray(repertoire.scores), np.asarray(repertoire.cells)
    found = []
    for _ in range(60):
        table = (dice.random((1, 2, 4)) < dice.random((1, 2, 1))).astype(np.float32)
        count = 2
        rests = np.array(list(itertools.product([0.0, 1.0], repeat=4)), np.float32)
        whole = np.repeat(table, len(rests), axis=0)
        whole[..., count:] = rests.reshape(-1, 2, 2)
        batch = jnp.asarray(whole.mean(axis=2))
        enters = any(
            bool(repertoire.decide(batch[i : i + 1]).accepted[0]) for i in range(len(rests))
        )
        found.append(enters)
        assert can_enter(grid, *state, *ends(known(table, count))).tolist() == [enters]
    assert 0 < sum(found) < len(found)


def test_the_range_of_a_score_closes_on_the_score_itself() -> None:
    table = random_table(np.random.default_rng(3), 20, 2, True)[:, 0]
    lower, upper = final_range(known(table, 5))
    score = table.mean(axis=1)
    assert ((lower <= score) & (score <= upper)).all()
    assert all(np.array_equal(end, score) for end in final_range(table))


def alike(dice: np.random.Generator, rows: int, problems: int) -> np.ndarray:
    """(rows, 2, problems) results: each task has two kinds of problems, solved or not together."""
    able = dice.random((rows, 2, 2)) < dice.beta(0.8, 0.8, (rows, 1, 2))
    kind = np.arange(problems) % 2
    slips = dice.random((rows, 2, problems)) < 0.1
    return (able[:, :, kind] ^ slips).astype(np.float32)


@pytest.mark.parametrize("allowed", [0.1, 0.3])
def test_of_the_stopped_no_more_would_have_entered_than_promised(allowed: float) -> None:
    dice = np.random.default_rng(1)
    grid = make_grid([0.0, 0.0], [1.0, 1.0], 4)
    count, batch = 16, 400
    elites = alike(dice, 40, count)
    repertoire = begin(grid, elites.mean(axis=2))
    state = np.asarray(repertoire.scores), np.asarray(repertoire.cells)
    table = alike(dice, batch, count)
    enters = can_enter(grid, *state, *ends(table))
    belief = believe(elites)
    order = informative_order(belief)
    racing = np.ones(batch, bool)
    for played in (8, 16, 24):
        shown = np.full((batch, 2 * count), np.nan, np.float32)
        shown[:, order[:played]] = table.reshape(batch, -1)[:, order[:played]]
        finals = draw_finals(dice, belief, shown.reshape(table.shape), 400)
        racing &= chance_of_entering(grid, *state, finals) > allowed
    stopped = ~racing
    assert 50 < stopped.sum() < batch
    noise = 3 * np.sqrt(allowed * (1 - allowed) / stopped.sum())
    assert enters[stopped].mean() <= allowed + noise
    assert enters[stopped].mean() < enters[racing].mean()


def test_the_first_problems_are_of_every_kind_and_tell_most() -> None:
    dice = np.random.default_rng(2)
    belief = believe(alike(dice, 60, 8))
    order = informative_order(belief)
    assert sorted(order.tolist()) == list(range(16))
    # Two tasks of two kinds: one of each before a second one of any.
    assert {(int(i) // 8, int(i) % 2) for i in order[:4]} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    table = alike(dice, 300, 8)
    scores = table.mean(axis=2)

    def error(played: np.ndarray) -> float:
        shown = np.full((300, 16), np.nan, np.float32)
        shown[:, played] = table.reshape(300, -1)[:, played]
        finals = draw_finals(dice, belief, shown.reshape(table.shape), 200)
        return float(np.sqrt(((finals.mean(axis=0) - scores) ** 2).mean()))

    assert error(order[:4]) < 0.8 * error(np.arange(0, 8, 2))


def test_drawn_scores_are_as_wide_as_the_belief_and_keep_what_was_played() -> None:
    dice = np.random.default_rng(3)
    # Two problems a task; the second of each is unknown, with a spread of 0.01 about a half.
    belief = Belief(np.full(4, 0.5), np.diag([0.1, 0.01, 0.1, 0.01]), 2)
    results = np.array([[[1.0, np.nan], [0.0, np.nan]]], np.float32)
    finals = draw_finals(dice, belief, results, 2000)
    assert finals.dtype == np.float32
    assert set(np.unique(finals[:, 0, 0])) <= {0.5, 1.0}
    assert set(np.unique(finals[:, 0, 1])) <= {0.0, 0.5}
    assert finals[:, 0, 0].mean() == pytest.approx(0.75, abs=0.02)
    whole = np.array([[[1.0, 1.0], [0.0, 1.0]]], np.float32)
    known_all = np.where(np.arange(2) < 2, whole, np.nan)
    assert np.allclose(draw_finals(dice, belief, known_all, 5), [1.0, 0.5])
