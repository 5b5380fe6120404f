"""Fewer problems a child: what is played, what is offered, and that all of it can be resumed."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.evaluate import Evaluator
from cycleqd_jax.runs.fitness import SOLVED, Fitness, Scored, problems_of
from cycleqd_jax.runs.records.lineage import Birth
from cycleqd_jax.tasks.base import Problem
from cycleqd_jax.tasks.played import Rollout

TASKS, PROBLEMS, CHILDREN, GENERATIONS = ("a", "b"), 12, 6, 8
CONFIG = RunConfig(
    base="base",
    experts={"one": "1", "two": "2"},
    tasks=TASKS,
    problems=PROBLEMS,
    children=CHILDREN,
    generations=GENERATIONS,
)


class ScriptedEvaluator(Evaluator):
    """A genotype is the number of its row in a table (rows, K, N) of results."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self.calls: list[tuple[str, Any, bool]] = []

    def population(
        self,
        gains: Any,
        problems: Any,
        on_progress: Any = None,
        *,
        phase: str = "",
        chosen: Any = None,
        more: bool = False,
    ) -> Rollout:
        self.calls.append((phase, chosen, more))
        rows = self.table[np.asarray(gains)]
        attempts = {
            name: np.where(True if chosen is None else chosen[name], rows[:, k], np.nan)
            .astype(np.float32)[:, :, None]
            for k, name in enumerate(TASKS)
        }  # fmt: skip
        counts = dict.fromkeys(TASKS, 0)
        return Rollout(attempts, {"model": 0.0, "sandbox": 0.0}, 0, counts, counts)


def table_of(seed: int) -> np.ndarray:
    """Two experts, then the children: skills rise slowly, so that many children are too weak."""
    dice = np.random.default_rng(seed)
    rows = 2 + CHILDREN * GENERATIONS
    skill = dice.beta(0.5, 0.5, (rows, 2, 1)) * np.linspace(0.6, 1.0, rows)[:, None, None]
    return (dice.random((rows, 2, PROBLEMS)) < skill).astype(np.float32)


class Loop:
    """The search without models: children come from a table whatever their parents are."""

    def __init__(self, config: RunConfig, table: np.ndarray) -> None:
        self.config, self.evaluator = config, ScriptedEvaluator(table)
        self.fitness = self.open()
        self.first = self.fitness.begin(table[:2])
        batch = jnp.asarray(self.first)
        kept = self.fitness.kept(table[:2])
        self.repertoire = CyclicRepertoire.init(
            jnp.arange(2, dtype=jnp.int32), batch, batch, make_grid([0.1, 0.1], [0.9, 0.9], 3),
            kept, keys_extra_scores=tuple(kept),
        )  # fmt: skip
        self.scored: list[Scored] = []
        self.problems = 0

    def open(self) -> Fitness:
        kinds = ["x", "y", "z"] * 4
        problems = [Problem(prompt=f"{i}", answers=("",), solution="", document="", kind=kind)
                    for i, kind in enumerate(kinds)]  # fmt: skip
        return Fitness(self.config, self.evaluator, dict.fromkeys(TASKS, problems))

    def step(self, generation: int) -> None:
        self.repertoire, grown = self.fitness.grow(self.repertoire, generation)
        self.problems += 0 if grown is None else problems_of(grown)
        children = jnp.arange(CHILDREN, dtype=jnp.int32) + 2 + CHILDREN * (generation - 1)
        scored = self.fitness.score(children, generation, self.repertoire)
        offered = jnp.asarray(scored.offered)
        kept = self.fitness.kept(scored.solved)
        self.repertoire = self.repertoire.add(children, offered, offered, kept)
        self.scored.append(scored)
        self.problems += scored.problems

    def run(self, generations: int = GENERATIONS) -> "Loop":
        for generation in range(len(self.scored) + 1, generations + 1):
            self.step(generation)
        return self


def state(loop: Loop) -> list[list[Any]]:
    repertoire = loop.repertoire
    used = np.asarray(repertoire.occupied)
    arrays = (repertoire.cells, repertoire.scores[used], repertoire.genotypes[used])
    return [np.asarray(array).tolist() for array in arrays]


@pytest.mark.parametrize("seed", range(4))
def test_racing_by_the_bound_ends_with_the_same_archives_and_fewer_problems(seed: int) -> None:
    table = table_of(seed)
    full = Loop(CONFIG, table).run()
    raced = Loop(replace(CONFIG, racing=1, racing_block=2), table).run()
    assert state(raced) == state(full)
    assert full.problems == CHILDREN * GENERATIONS * PROBLEMS * len(TASKS)
    assert raced.problems < full.problems
    assert all(chosen is None for _, chosen, _ in full.evaluator.calls)
    for one, every in zip(raced.scored, full.scored, strict=True):
        stays = one.racing
        assert np.array_equal(one.scores[stays], every.scores[stays])
        assert np.isnan(one.offered[~stays]).all()
        for child in range(CHILDREN):
            counts = one.problems_of(child)
            if stays[child]:
                assert counts is None
            else:
                assert counts is not None
                assert 2 <= min(counts) <= max(counts) < PROBLEMS
                known = ~np.isnan(one.solved[child])
                estimate = [one.solved[child, k][known[k]].mean() for k in range(2)]
                assert one.scores[child] == pytest.approx(estimate)


def test_a_child_that_is_left_out_has_an_estimate_on_every_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The problems that tell most may all be of one task.
    monkeypatch.setattr(
        "cycleqd_jax.runs.fitness.informative_order", lambda belief: np.arange(len(belief.mean))
    )
    loop = Loop(replace(CONFIG, racing=0.5, racing_block=1), table_of(3)).run()
    out = np.concatenate([~one.racing for one in loop.scored])
    scores = np.concatenate([one.scores for one in loop.scored])[out]
    counts = [one.problems_of(i) for one in loop.scored for i in range(CHILDREN)]
    assert any(count is not None and 0 in count for count in counts)
    assert ((scores >= 0.0) & (scores <= 1.0)).all()


def test_parts_of_a_generation_are_one_phase_and_no_episode_is_played_twice() -> None:
    loop = Loop(replace(CONFIG, racing=0.7, racing_block=5), table_of(0)).run()
    for generation in range(1, GENERATIONS + 1):
        parts = [call for call in loop.evaluator.calls if call[0] == f"generation-{generation:06d}"]
        assert [more for _, _, more in parts] == [False] + [True] * (len(parts) - 1)
        played = np.sum([chosen["a"] for _, chosen, _ in parts], axis=0)
        assert played.max() == 1


def test_subsets_grow_and_elites_play_only_what_they_lack() -> None:
    config = replace(CONFIG, subsets=(3, 6), growth=(3, 6))
    table = table_of(1)
    loop = Loop(config, table)
    assert [loop.fitness.size(generation) for generation in range(1, 9)] == [
        3,
        3,
        6,
        6,
        6,
        12,
        12,
        12,
    ]
    orders = loop.fitness.orders
    assert loop.first[0, 0] == pytest.approx(table[0, 0, orders["a"][:3]].mean())
    loop.run(5)
    before = state(loop)
    elites = np.asarray(loop.repertoire.genotypes)[np.asarray(loop.repertoire.occupied)]
    assert loop.scored[4].problems_of(0) == [6, 6]
    loop.run(6)
    phase, chosen, _ = loop.evaluator.calls[-2]
    assert phase == "growth-000006"
    fresh = [row for row in elites.tolist() if row >= 2]
    expected = np.zeros(PROBLEMS, bool)
    expected[orders["a"][6:]] = True
    rows = [chosen["a"][elites.tolist().index(row)] for row in fresh]
    assert np.array_equal(rows, [expected] * len(fresh))
    # The experts were played on everything when the search began.
    assert not chosen["a"][[row < 2 for row in elites]].any()
    loop.run()
    assert state(loop) != before
    used = np.asarray(loop.repertoire.occupied)
    final = np.asarray(loop.repertoire.genotypes)[used]
    assert np.array_equal(np.asarray(loop.repertoire.scores)[used], table[final].mean(axis=2))
    assert not np.isnan(np.asarray(loop.repertoire.extra_scores[SOLVED])[used]).any()


@pytest.mark.parametrize(
    "change",
    [{"racing": 0.6, "racing_block": 2}, {"racing": 0.6, "racing_block": 2, "subsets": (4,)}],
)
def test_a_search_goes_on_from_its_repertoire_and_the_order_of_its_problems(
    change: dict[str, Any],
) -> None:
    config, table = replace(CONFIG, **change), table_of(2)
    whole = Loop(config, table).run()
    broken = Loop(config, table).run(3)
    orders = broken.fitness.orders
    broken.fitness = broken.open()
    broken.fitness.resume(orders)
    broken.run()
    assert state(broken) == state(whole)
    assert broken.problems == whole.problems < CHILDREN * GENERATIONS * PROBLEMS * len(TASKS)


def test_a_birth_says_on_how_many_problems_its_scores_rest_where_not_on_all() -> None:
    whole = Birth(3, (0, 1), 0, 1, {"a": 0.5, "b": 0.5})
    assert "problems" not in whole.to_row()
    part = replace(whole, problems=[4, 4])
    for birth in (whole, part):
        assert Birth.from_row(birth.to_row()) == birth


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"racing": 0.0}, "racing: expected a confidence above 0 and up to 1, or None, found 0"),
        ({"racing": 1.1}, "racing: expected a confidence"),
        ({"racing_block": 0}, "racing_block: expected at least 1, found 0"),
        ({"subsets": (6, 3)}, "subsets: expected growing numbers between 1 and problems"),
        ({"subsets": (12,)}, r"subsets: expected growing numbers .* \(12\), found \[12\]"),
        ({"subsets": (3, 6), "growth": (4,)}, "growth: expected a generation for each of 2"),
        ({"subsets": (3,), "growth": (1,)}, "growth: expected growing numbers between 2 and"),
        ({"subsets": (3,), "growth": (9,)}, "the last generations play all problems"),
        ({"growth": (3,)}, "growth: expected a generation for each of 0 subsets"),
    ],
)
def test_settings_out_of_range_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_without_generations_given_subsets_share_the_run_equally() -> None:
    assert replace(CONFIG, generations=30, subsets=(3, 6)).grows_at == (11, 21)
