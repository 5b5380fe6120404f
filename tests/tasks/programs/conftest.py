"""Small files in the public formats, judged answers, and the public files where there are some."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cycleqd_jax
from cycleqd_jax.sandbox import Sandbox
from cycleqd_jax.tasks.programs.judging import Verdict
from cycleqd_jax.tasks.programs.task import ProgramTask, open_programs

Judge = Callable[..., list[Verdict]]

# Four published formats, with problems of our own.
MBPP = {
    "text": "Write a function to double a number.",
    "code": "def double(x):\r\n  return 2 * x",
    "task_id": 601,
    "test_setup_code": "",
    "test_list": ["assert double(2) == 4", "assert double(0) == 0", "assert double(-3) == -6"],
    "challenge_test_list": [],
}
SANITIZED = {
    "source_file": "x.ipynb",
    "task_id": 2,
    "prompt": "Write a function to find a root.",
    "code": "import math\ndef root(x):\n  return math.sqrt(x)",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(root(2), 1.41421, rel_tol=1e-3)", "assert root(4) == 2"],
}
MBPP_PLUS = {
    "task_id": "Mbpp/63",
    "prompt": '"""\nWrite a function to pair\nassert pair([(1, 2)]) == [(2, 1)]\n"""\n',
    "entry_point": "pair",
    "canonical_solution": "\ndef pair(rows):\n  return [(b, a) for a, b in rows]\n",
    "contract": "",
    "assertion": "",
    "base_input": [[[[1, 2]]], [[[3, 4], [5, 6]]]],
    "plus_input": [[[]], [[[0, -1]]], [[["a", None]]]],
    "atol": 0,
}
HUMANEVAL = {
    "task_id": "HumanEval/7",
    "prompt": "from typing import List\n\n\ndef mean(xs: List[float]) -> float:\n"
    '    """Mean.\n    >>> mean([1.0, 2.0])\n    1.5\n    """\n',
    "entry_point": "mean",
    "canonical_solution": "    return sum(xs) / len(xs)\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    for n in range(1, 5):\n"
    "        assert abs(candidate(list(range(n))) - (n - 1) / 2) < 1e-6\n"
    "    assert candidate([2.0]) == 2.0\n",
}
HUMANEVAL_PLUS = {
    **HUMANEVAL,
    "contract": "",
    "base_input": [[[1.0, 2.0]], [[0.1, 0.2, 0.3]]],
    "plus_input": [[[1e300, 1e300]], [[0.7, 0.1]]],
    "atol": 0,
}


def write_files(folder: Path, **changes: dict[str, Any]) -> Path:
    """One record a benchmark; changes by the name of the constant."""
    records = {
        name: {**record, **changes.get(name, {})}
        for name, record in [
            ("MBPP", MBPP),
            ("SANITIZED", SANITIZED),
            ("MBPP_PLUS", MBPP_PLUS),
            ("HUMANEVAL", HUMANEVAL),
            ("HUMANEVAL_PLUS", HUMANEVAL_PLUS),
        ]
    }
    lines = {name: json.dumps(record) + "\n" for name, record in records.items()}
    (folder / "mbpp").mkdir(exist_ok=True)
    (folder / "humaneval").mkdir(exist_ok=True)
    (folder / "mbpp/mbpp.jsonl").write_text(lines["MBPP"])
    (folder / "mbpp/sanitized-mbpp.json").write_text(f"[{lines['SANITIZED']}]")
    for path, name in (
        ("mbpp/MbppPlus-v0.1.0.jsonl.gz", "MBPP_PLUS"),
        ("humaneval/HumanEval.jsonl.gz", "HUMANEVAL"),
        ("humaneval/HumanEvalPlus-v0.1.9.jsonl.gz", "HUMANEVAL_PLUS"),
    ):
        (folder / path).write_bytes(gzip.compress(lines[name].encode()))
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def opened(files: Path, sandbox: Sandbox) -> Callable[..., ProgramTask]:
    return lambda name, **options: open_programs(name, files, sandbox=sandbox, **options)


@pytest.fixture(scope="session")
def judged(opened: Callable[..., ProgramTask], sandbox: Sandbox) -> Judge:
    """``judged(name, answers)``: verdicts of answers to the one problem of a small file."""

    def judge(name: str, answers: list[str], chosen: Sandbox = sandbox) -> list[Verdict]:
        task = opened(name)
        return task.verdicts(task.every_problem() * len(answers), answers, chosen)

    return judge


@pytest.fixture(scope="session")
def public_files() -> Path:
    """The folder with the public files; `$CYCLEQD_DATA`, or shared/data beside the checkout."""
    beside = Path(cycleqd_jax.__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CYCLEQD_DATA", beside))
    if not (folder / "mbpp" / "mbpp.jsonl").is_file():
        pytest.skip(f"no mbpp/mbpp.jsonl in {folder} (set CYCLEQD_DATA)")
    return folder
