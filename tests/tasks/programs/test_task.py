"""The episode, its problems, what they are judged by, and how a user names them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cycleqd_jax.sandbox import Job, Limits, MemoSandbox, Sandbox
from cycleqd_jax.tasks.base import Split
from cycleqd_jax.tasks.benchmark import sandbox_limits
from cycleqd_jax.tasks.coding import CodingTask
from cycleqd_jax.tasks.programs.judging import LIMITS, Suite, Verdict
from cycleqd_jax.tasks.programs.records import Inputs, Record, Statements
from cycleqd_jax.tasks.programs.task import (
    PassRates,
    ProgramTask,
    open_programs,
    pass_rates,
    programs_from_environment,
)
from cycleqd_jax.tasks.registry import make_tasks

from .conftest import Judge, write_files

Open = Callable[..., ProgramTask]
Score = Callable[..., list[float]]
SPLITS: tuple[Split, ...] = ("search", "validation", "test")

BASE_ONLY = "def pair(rows): return [(b, a) for a, b in rows if a]"
RIGHT = "```python\ndef pair(rows):\n    return [row[::-1] for row in rows]\n```"


@pytest.mark.parametrize("name", ["mbpp", "mbpp/sanitized", "mbpp+", "humaneval", "humaneval+"])
def test_the_reference_passes_and_nothing_does_not(name: str, opened: Open, score: Score) -> None:
    (problem,) = (task := opened(name)).every_problem()
    assert score(task, problem, [problem.answers, [""]]) == [1.0, 0.0]


def test_plus_is_base_and_more(judged: Judge, opened: Open, score: Score) -> None:
    verdicts = judged("mbpp+", [RIGHT, BASE_ONLY, "def pair(rows): return []"])
    assert [(v.base, v.plus) for v in verdicts] == [(True, True), (True, False), (False, False)]
    assert [v.reason for v in verdicts[1:]] == ["call 2: wrong result", "call 1: wrong result"]
    assert pass_rates(verdicts) == PassRates(2 / 3, 1 / 3)
    task, paper = opened("mbpp+"), opened("mbpp+", preset="paper")
    for chosen, scores in ((task, [1.0, 0.0]), (paper, [1.0, 1.0])):
        (problem,) = chosen.every_problem()
        # The fixture counts messages; the paper's prompt has one more before the turn.
        turns = [[text] * 2 for text in (RIGHT, BASE_ONLY)]
        assert score(chosen, problem, turns) == scores
    assert pass_rates([Verdict(True), Verdict(False)]) == PassRates(0.5, None)
    with pytest.raises(ValueError, match="expected verdicts"):
        pass_rates([])


def test_results_are_judged_by_type_where_python_does(judged: Judge) -> None:
    lists = "def pair(rows): return [[b, a] for a, b in rows]"
    lazy = "def pair(rows): return ((b, a) for a, b in rows)"
    subclass = (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\n"
        "class L(list): pass\ndef pair(rows): return L(P(b, a) for a, b in rows)"
    )
    assert [v.plus for v in judged("mbpp+", [lists, lazy, subclass])] == [False, False, True]


def test_a_continued_stub_and_a_program_without_its_imports(judged: Judge) -> None:
    rest = "    return sum(xs) / len(xs)\n"
    whole = "def mean(xs: List[float]) -> float:\n" + rest
    assert [v.base for v in judged("humaneval", [rest, whole])] == [True, True]
    # EvalPlus runs what a model says alone.
    assert [v.plus for v in judged("humaneval+", [rest, whole])] == [True, False]


def test_what_a_program_prints_is_nobodys_business(judged: Judge) -> None:
    loud = "def double(x):\n    print('x' * 100_000)\n    return 2 * x"
    assert judged("mbpp", [loud])[0].base


def test_calls_that_ask_for_values_of_the_tests(opened: Open, sandbox: Sandbox) -> None:
    (problem,) = opened("mbpp").every_problem()
    tests = Statements(
        "assert depth(root) == 2\nassert depth(root.left) == 1",
        "root = Node(1)\nroot.left = Node(2)",
        ("depth(root)", "depth(root.left)"),
    )
    node = "class Node:\n    def __init__(self, v):\n        self.v, self.left = v, None\n"
    code = node + "def depth(n): return 1 + depth(n.left) if n else 0"
    record = replace(problem.record, function="depth", reference=code, tests=tests)
    task = ProgramTask((record,), ((Suite(tests.calls or ()),),), "x")
    answers = [code, code.replace("1 +", "2 +"), "def depth(n): return 2"]
    verdicts = task.verdicts(task.every_problem() * 3, answers, sandbox)
    assert [v.base for v in verdicts] == [True, False, False]


def test_large_and_special_results_are_compared(opened: Open, sandbox: Sandbox) -> None:
    (problem,) = opened("mbpp+").every_problem()
    record = replace(problem.record, function="f", reference="def f(n):\n    return VALUES[n]")
    values = "[[(1, 'a')] * 9000, 10 ** 6000, {1j, 'x'}, b'x', float('inf'), None, {(1,): {2}}]"
    assert isinstance(record.tests, Inputs)
    inputs = replace(record.tests, base=tuple({"tuple": [n]} for n in range(7)), plus=())
    record = replace(record, reference=f"VALUES = {values}\n{record.reference}", tests=inputs)
    from cycleqd_jax.tasks.programs.references import find_suites

    (suites,) = find_suites([record], None, sandbox)
    assert suites[0].expected is not None
    assert [*suites[0].expected[0]] == ["digest"]
    task = ProgramTask((record,), (suites,), "x")
    wrong = record.reference.replace("(1, 'a')] * 9000", "(1, 'b')] * 9000")
    verdicts = task.verdicts(task.every_problem() * 2, [record.reference, wrong], sandbox)
    assert [v.plus for v in verdicts] == [True, False]


@pytest.mark.parametrize(("name", "jobs"), [("mbpp+", 2), ("humaneval", 1), ("mbpp", 0)])
def test_references_run_once_and_again_when_something_changed(
    name: Any, jobs: int, tmp_path: Path, sandbox: Sandbox
) -> None:
    folder, cache = write_files(tmp_path), tmp_path / "cache"
    counting = MemoSandbox(sandbox)
    first = open_programs(name, folder, cache=cache, sandbox=counting)
    assert counting.hits + counting.misses == jobs
    assert open_programs(name, folder, cache=cache, sandbox=counting) == first
    assert counting.hits + counting.misses == jobs
    for entry in cache.rglob("*.json"):
        entry.write_text(entry.read_text()[:-3])
    for _ in range(2):  # what is damaged is run again and replaced
        assert open_programs(name, folder, cache=cache, sandbox=counting) == first
        assert counting.hits + counting.misses == 2 * jobs
    write_files(tmp_path, MBPP_PLUS={"canonical_solution": "\ndef pair(x): return x"},
                HUMANEVAL={"canonical_solution": "    return sum(xs) / len(xs) + 0\n"})  # fmt: skip
    open_programs(name, folder, cache=cache, sandbox=counting)
    assert counting.hits + counting.misses == 3 * jobs


def test_a_reference_that_fails_is_named(tmp_path: Path, sandbox: Sandbox) -> None:
    folder = write_files(
        tmp_path,
        MBPP_PLUS={"canonical_solution": "\ndef pair(x): return 1 / 0"},
        HUMANEVAL={"canonical_solution": "    return -1\n"},
    )
    cache = tmp_path / "cache"
    for name, why in (("mbpp+", "call 1: ZeroDivisionError"), ("humaneval", "AssertionError")):
        with pytest.raises(ValueError, match=rf"(?s)1 reference solutions fail.*/\d+: .*{why}"):
            open_programs(name, folder, cache=cache, sandbox=sandbox)  # type: ignore[arg-type]


def test_equal_answers_run_once(opened: Open, sandbox: Sandbox) -> None:
    memo = MemoSandbox(sandbox)  # not closed: the sandbox is everybody's
    task = opened("mbpp+")
    task.verdicts(task.every_problem() * 3, [RIGHT] * 3, memo)
    assert (memo.misses, memo.hits) == (2, 4)


def _many(task: ProgramTask, numbers: range, official: bool) -> ProgramTask:
    def record(number: int) -> Record:
        split = ("test" if number % 2 else "train") if official else None
        text = f"{number} {task.records[0].text}"
        return replace(task.records[0], id=f"mbpp/{number}", text=text, split=split)  # type: ignore[arg-type]

    records = tuple(map(record, numbers))
    return replace(task, records=records, suites=task.suites * len(records))


def test_splits_are_disjoint_and_alike_in_all_editions(opened: Open) -> None:
    full = _many(opened("mbpp"), range(1, 200), official=True)
    plus = _many(opened("mbpp+"), range(50, 250), official=False)
    of_id: dict[str, set[Split]] = {}
    for task in (full, plus):
        for split in SPLITS:
            size = _size(task, split)
            drawn = task.problems(split, size, seed=1)
            assert task.problems(split, size, seed=1) == drawn
            for problem in drawn:
                of_id.setdefault(problem.record.id, set()).add(split)
                assert split == "test" or problem.record.split != "test"
    assert all(len(splits) == 1 for splits in of_id.values())
    assert {p.record.split for p in full.problems("test", _size(full, "test"))} == {"train", "test"}
    assert len(full.official("test")) == 100
    with pytest.raises(ValueError, match=r"authors' splits \(none\), found 'test'"):
        plus.official("test")
    with pytest.raises(ValueError, match="split 'train' of mbpp, found 0"):
        full.problems("train", 1)


def _size(task: ProgramTask, split: Split) -> int:
    with pytest.raises(ValueError, match="ask for fewer") as error:
        task.problems(split, 10_000)
    return int(str(error.value).split("found ")[1].split()[0])


def test_prompts_are_the_published_ones(opened: Open) -> None:
    def said(name: str, **options: Any) -> list[tuple[str, str]]:
        return [tuple(m) for m in opened(name, **options).every_problem()[0].opening]  # type: ignore[misc]

    assert said("mbpp") == [(
        "user",
        "You are an expert Python programmer, and here is your task: Write a function to double a "
        "number. Your code should pass these tests:\n\nassert double(2) == 4\n"
        "assert double(0) == 0\nassert double(-3) == -6\n",
    )]  # fmt: skip
    ask = (
        "Please provide a self-contained Python script that solves the following problem in a "
        "markdown code block:\n```\n"
    )
    docstring = '"""\nWrite a function to pair\nassert pair([(1, 2)]) == [(2, 1)]\n"""'
    assert said("mbpp+") == [("user", f"{ask}{docstring}\n```\n")]
    assert said("humaneval") == said("humaneval+")
    assert said("humaneval")[0][1].startswith(f"{ask}from typing import List\n\n\ndef mean(xs")
    system, user = said("mbpp+", preset="paper")
    assert system[0] == "system"
    assert user[1] == (
        "Write a function to pair. Your code should satisfy the following assertion:\n"
        "```python\nassert pair([(1, 2)]) == [(2, 1)]\n```"
    )
    with pytest.raises(ValueError, match=r"humaneval/7: expected MBPP\+'s prompt"):
        opened("humaneval+", preset="paper")


def test_a_demonstration_is_the_whole_ideal_conversation(opened: Open) -> None:
    (problem,) = opened("mbpp+", preset="paper").every_problem()
    turns = problem.demonstration
    assert turns[:2] == problem.opening
    assert [turn.role for turn in turns] == ["system", "user", "assistant"]
    assert turns[2].content == f"```python\n{problem.record.reference.strip()}\n```"


def test_users_name_it_and_say_where_it_is(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CYCLEQD_DATA", raising=False)
    with pytest.raises(ValueError, match=r"task mbpp\+: set CYCLEQD_DATA to a folder that holds "
                       r"mbpp/MbppPlus"):  # fmt: skip
        programs_from_environment("mbpp+")
    monkeypatch.setenv("CYCLEQD_DATA", str(files))
    monkeypatch.setenv("CYCLEQD_CACHE", str(tmp_path))
    mbpp, sanitized = make_tasks(["mbpp", "mbpp/sanitized"])
    assert (mbpp.name, sanitized.name) == ("mbpp", "mbpp/sanitized")
    assert isinstance(mbpp, ProgramTask)
    assert sandbox_limits([CodingTask(), mbpp]) == replace(LIMITS, processes=Limits().processes)
    assert sandbox_limits([CodingTask()]) == Limits()


def test_a_job_carries_neither_tests_nor_answers(opened: Open) -> None:
    for name in ("mbpp", "mbpp+", "humaneval", "humaneval+"):
        task = opened(name)
        (problem,) = task.every_problem()
        episode = task.episode(problem)
        episode.send(None)
        step: Any = episode.send("def x(): pass")
        assert isinstance(step.job, Job)
        sent = json.loads(step.job.stdin)
        assert set(sent) == {"mode", "function", "program", "setup", "calls", "limits", "total"}
        assert sent["mode"] == "call"
        assert "assert" not in step.job.stdin
        episode.close()
