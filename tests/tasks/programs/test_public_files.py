"""The public files: their reference solutions pass; verdicts agree with EvalPlus's."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cycleqd_jax.sandbox import Sandbox, open_sandbox
from cycleqd_jax.tasks.programs.records import Inputs, Name, read_records
from cycleqd_jax.tasks.programs.references import REFERENCE_LIMITS
from cycleqd_jax.tasks.programs.runner import decode
from cycleqd_jax.tasks.programs.task import open_programs

# EvalPlus runs programs in a fork of its own process, which must not be this one.
_EVALPLUS = """
import json, sys
from evalplus.data.mbpp import get_mbpp_plus
from evalplus.eval import untrusted_check
from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
from evalplus.gen.util import trusted_exec
problems = get_mbpp_plus(err_incomplete=False)
asked = json.load(sys.stdin)
if asked is None:
    json.dump({k: repr([*map(tuple, p["base_input"]), *map(tuple, p["plus_input"])])
               for k, p in problems.items()}, sys.stdout)
    sys.exit()
verdicts = []
for name, programs in asked.items():
    p = problems[name]
    function, inputs = p["entry_point"], [p["base_input"], p["plus_input"]]
    code, truth = p["prompt"] + p["canonical_solution"], []
    for group in inputs:
        truth.append(trusted_exec(code, group, function, True,
                                  function in MBPP_OUTPUT_NOT_NONE_TASKS))
    for program in programs:
        found = [untrusted_check("mbpp", program, group, function, expected, p["atol"], times,
                                 fast_check=True)[0] == "pass"
                 for group, (expected, times) in zip(inputs, truth)]
        verdicts.append([found[0], all(found)])
json.dump(verdicts, sys.stdout)
"""
# What a program may do to a right result, to be right or wrong in every way there is a rule for.
_CHANGES = ("r", "repr(r)", "[r]", "None", "r + 1", "r * (1 + 1e-9)", "r + 1e-5", "r[::-1]",
            "tuple(r)", "list(r)", "set(r)", "float(r)", "bool(r)", "0")  # fmt: skip
_SPECIAL = (2, 7, 111, 140, 164, 232, 249, 295, 558, 579, 581, 737, 769, 787, 794)
_TOO_SLOW = (255, 599)


@pytest.fixture(scope="module")
def roomy() -> Iterator[Sandbox]:
    with open_sandbox(limits=REFERENCE_LIMITS, workers=2) as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("mbpp", 974), ("mbpp/sanitized", 427), ("humaneval", 164), ("mbpp+", 399)]
)
def test_every_reference_solution_passes(
    name: Name, size: int, public_files: Path, roomy: Sandbox
) -> None:
    task = open_programs(name, public_files, sandbox=roomy)
    problems = task.every_problem()
    assert len({problem.prompt for problem in problems}) == len(problems) == size
    verdicts = task.verdicts(problems, [problem.answers[0] for problem in problems], roomy)
    failed = [
        (problem.record.id, verdict.reason)
        for problem, verdict in zip(problems, verdicts, strict=True)
        if not verdict.base or verdict.plus is False
    ]
    assert failed == []


@pytest.fixture(scope="module")
def plus_file(public_files: Path) -> Path:
    if importlib.util.find_spec("evalplus") is None:
        pytest.skip("evalplus is not installed (pip install evalplus)")
    return next((public_files / "mbpp").glob("MbppPlus*"))


def _evalplus(file: Path, asked: object) -> object:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _EVALPLUS],
        input=json.dumps(asked), capture_output=True, text=True, check=True,
        env={**os.environ, "MBPP_OVERRIDE_PATH": str(file)},
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.slow
def test_arguments_are_restored_as_evalplus_does(public_files: Path, plus_file: Path) -> None:
    theirs = _evalplus(plus_file, None)
    ours = {}
    for record in read_records("mbpp+", public_files):
        assert isinstance(record.tests, Inputs)
        calls = [decode(call) for call in (*record.tests.base, *record.tests.plus)]
        ours[record.id.replace("mbpp", "Mbpp")] = calls
    assert isinstance(theirs, dict)
    assert ours.keys() == theirs.keys()
    for number, text in theirs.items():
        # A set is written in another order by every process.
        assert repr(ours[number]) == text or ours[number] == ast.literal_eval(text), number


@pytest.mark.slow
def test_verdicts_are_evalplus_s(public_files: Path, plus_file: Path, roomy: Sandbox) -> None:
    task = open_programs("mbpp+", public_files, sandbox=roomy)
    every = {int(p.record.id.split("/")[1]): p for p in task.every_problem()}
    numbers = sorted({*list(every)[::12], *_SPECIAL} & every.keys() - set(_TOO_SLOW))
    programs = {
        number: [
            f"{every[number].record.reference}\n_right = {every[number].record.function}\n"
            f"def {every[number].record.function}(*a):\n    r = _right(*a)\n    return {change}\n"
            for change in _CHANGES
        ]
        for number in numbers
    }
    theirs = _evalplus(plus_file, {f"Mbpp/{n}": texts for n, texts in programs.items()})
    problems = [every[number] for number in numbers for _ in _CHANGES]
    verdicts = task.verdicts(problems, [t for texts in programs.values() for t in texts], roomy)
    ours = [[verdict.base, bool(verdict.plus)] for verdict in verdicts]
    labels = [(number, change) for number in numbers for change in _CHANGES]
    assert dict(zip(labels, ours, strict=True)) == dict(zip(labels, theirs, strict=True))  # type: ignore[call-overload]
