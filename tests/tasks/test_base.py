"""Splits, draws and conversations, for every task of the registry."""

import dataclasses
import hashlib
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from cycleqd_jax.tasks import coding, database, shell
from cycleqd_jax.tasks.base import Message, Problem, Split, draw_problems, split_of
from cycleqd_jax.tasks.registry import TASKS

SPLITS: tuple[Split, ...] = ("train", "search", "validation", "test")
MAKERS: dict[str, Any] = {
    "coding": coding.make_problem,
    "database": database.make_problem,
    "shell": shell.make_problem,
}
every_task = pytest.mark.parametrize("name", sorted(TASKS))

FINGERPRINT = """
import hashlib, sys
from cycleqd_jax.tasks.registry import TASKS
tasks = [TASKS[name]() for name in sorted(TASKS)]
drawn = [task.problems("search", 12, seed=5, difficulty=d) for task in tasks for d in (1, 3)]
print(hashlib.sha256(repr(drawn).encode()).hexdigest())
"""


def draw(name: str, split: Split, count: int, **options: int) -> Sequence[Problem]:
    return TASKS[name]().problems(split, count, **options)


def word_problem(rng: random.Random, difficulty: int) -> Problem:
    """One of 40 problems."""
    prompt = f"p{difficulty}-{rng.randrange(40)}"
    return Problem(prompt=prompt, answers=("a",), solution=prompt, document="", kind="k")


def test_every_task_has_its_maker_tested_here() -> None:
    assert sorted(MAKERS) == sorted(TASKS)


@every_task
def test_no_problem_is_in_two_splits(name: str) -> None:
    drawn = {
        split: [
            problem
            for seed in (0, 7)
            for difficulty in (1, 2, 3)
            for problem in draw(name, split, 30, seed=seed, difficulty=difficulty)
        ]
        for split in SPLITS
    }
    for what in ("prompt", "solution"):
        found = [{getattr(problem, what) for problem in drawn[split]} for split in SPLITS]
        assert min(map(len, found)) > 120
        assert len(set.union(*found)) == sum(map(len, found))


@pytest.mark.slow
@every_task
def test_a_test_problem_in_other_words_is_no_training_problem(name: str) -> None:
    # What an expert is trained on: whole texts, whatever their first line calls things.
    learnt = {p.document.split("\n", 1)[-1] for p in draw(name, "train", 1500)}
    asked = {p.document.split("\n", 1)[-1] for p in draw(name, "test", 150)}
    assert not learnt & asked


@every_task
def test_drawn_problems_belong_to_the_split_that_was_asked_for(name: str) -> None:
    for split in SPLITS:
        assert {split_of(problem.solution) for problem in draw(name, split, 40)} == {split}


def test_split_of_never_changes() -> None:
    # A trained family has seen "train": another assignment would leak it into "test".
    found = [split_of(f"problem {number}") for number in range(12)]
    assert " ".join(split[:2] for split in found) == "te va tr se se tr tr se tr tr tr tr"


def test_split_of_shares_solutions_out_six_two_one_one() -> None:
    counts = Counter(split_of(f"Count the {number} things.") for number in range(5000))
    assert {split: round(counts[split] / 500) for split in SPLITS} == {
        "train": 6,
        "search": 2,
        "validation": 1,
        "test": 1,
    }


@every_task
def test_a_seed_gives_the_same_distinct_problems(name: str) -> None:
    first = draw(name, "search", 80, seed=3, difficulty=2)
    assert first == draw(name, "search", 80, seed=3, difficulty=2)
    assert len({problem.prompt for problem in first}) == len(first) == 80


@every_task
def test_asking_for_fewer_gives_the_first_ones(name: str) -> None:
    assert draw(name, "train", 10, seed=2) == draw(name, "train", 30, seed=2)[:10]


@every_task
def test_seeds_and_difficulties_differ(name: str) -> None:
    draws = [draw(name, "train", 50, seed=s, difficulty=d) for s, d in ((0, 1), (1, 1), (0, 2))]
    prompts = [{problem.prompt for problem in drawn} for drawn in draws]
    assert len(prompts[0] & prompts[1]) < 25
    assert not prompts[0] & prompts[2] or name == "database"  # a lookup has no more conditions
    assert prompts[0] != prompts[2]


def test_another_process_with_other_hashes_draws_the_same() -> None:
    drawn = [
        TASKS[n]().problems("search", 12, seed=5, difficulty=d)
        for n in sorted(TASKS)
        for d in (1, 3)
    ]
    digest = hashlib.sha256(repr(drawn).encode()).hexdigest()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", FINGERPRINT],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(p for p in sys.path if p)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == digest


@pytest.mark.parametrize("difficulty", [1, 2])
@every_task
def test_equal_prompts_are_equal_problems(name: str, difficulty: int) -> None:
    known: dict[str, dict[str, Any]] = {}
    repeats = 0
    for seed in range(600 if difficulty == 1 else 100):
        problem = MAKERS[name](random.Random(seed), difficulty)
        fields = dataclasses.asdict(problem)
        repeats += problem.prompt in known
        assert known.setdefault(problem.prompt, fields) == fields
    assert repeats > 0 or difficulty > 1


def test_more_problems_than_there_are_is_an_error() -> None:
    available = sum(split_of(f"p1-{number}") == "train" for number in range(40))
    found = draw_problems(word_problem, "train", available, 0, 1)
    assert len({problem.prompt for problem in found}) == available
    message = f"expected {available + 1} distinct problems for split 'train' at difficulty 1, "
    message += f"found only {available}: ask for fewer"
    with pytest.raises(ValueError, match=message):
        draw_problems(word_problem, "train", available + 1, 0, 1)


def test_no_problems_is_an_empty_list() -> None:
    assert draw_problems(word_problem, "test", 0, 0, 1) == []


@every_task
def test_a_demonstration_is_the_whole_ideal_conversation(name: str) -> None:
    for problem in draw(name, "train", 20):
        turns = problem.demonstration
        assert turns[0] == Message("user", problem.prompt)
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert tuple(turn.content for turn in turns[1::2]) == problem.answers
        assert tuple(turn.content for turn in turns[2::2]) == problem.observations


def test_a_demonstration_without_its_observation_is_an_error() -> None:
    problem = Problem(prompt="p", answers=("a", "b"), solution="", document="", kind="k")
    with pytest.raises(ValueError, match="zip"):
        _ = problem.demonstration
