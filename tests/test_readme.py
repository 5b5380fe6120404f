"""What the README says runs: its Python blocks work as they stand, its commands exist."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.qd.presets import Preset
from cycleqd_jax.sandbox import Limits, open_sandbox
from cycleqd_jax.tasks.base import Request
from cycleqd_jax.tasks.policies import ScriptedPolicy, ideal_policy
from cycleqd_jax.tasks.registry import make_tasks
from cycleqd_jax.tasks.rollout import rollout

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_parts_of_the_readme_breed() -> None:
    """One block after the other, as a reader would paste them, on classifiers of digits."""
    digits = script("digits")
    problem = digits.make_problem(seed=0)
    space: dict[str, Any] = {
        "base": problem.base,
        "experts": problem.experts,
        "roles": digits.ROLES,
        "skills": lambda params: digits.accuracies(params, *problem.search),
    }
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(block, space)
    assert isinstance(space["preset"], Preset)
    assert len(blocks[1].strip().splitlines()) <= 15
    schedule = space["first_half"](jnp.int32(1), 16, 3)
    assert sorted(np.bincount(schedule).tolist()) == [4, 4, 8]
    scores = np.asarray(space["repertoire"].scores)[np.asarray(space["repertoire"].occupied)]
    assert scores.shape[0] > 100
    starts = np.asarray(space["score"](space["starts"], None)[0])
    assert scores.mean(axis=1).max() > starts.mean(axis=1).max() + 0.1
    assert (np.asarray(space["history"]["coverage"])[-1] > 0.05).all()


def test_a_task_of_ones_own_is_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's block as a file, named as on the command line."""
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Ask" in b)
    assert len([line for line in block.splitlines() if line.strip()]) <= 30
    (tmp_path / "patterns.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    tasks = make_tasks(["patterns:Patterns", "coding"])
    problems = {task.name: task.problems("search", 5) for task in tasks}
    ideal = ideal_policy(problem for drawn in problems.values() for problem in drawn)

    def speak(request: Request) -> str:
        return ["", "(", ideal.speak(request)][request.candidate]

    with open_sandbox(limits=Limits(seconds=30.0)) as sandbox:
        played = rollout(tasks, problems, 3, ScriptedPolicy(speak), sandbox)
    assert played.scores.tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]


@pytest.mark.slow
def test_the_digits_example_draws_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = script("digits")
    monkeypatch.setattr(digits, "GENERATIONS", 6)
    picture = tmp_path / "new" / "digits.png"
    monkeypatch.setattr(sys, "argv", ["digits.py", "--out", str(picture)])
    digits.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "cycleqd/best" in capsys.readouterr().out


def test_the_scripts_of_the_readme_exist() -> None:
    scripts = set(re.findall(r"python (\S+\.py)", README))
    assert scripts == {
        "experiments/quickstart.py",
        "experiments/evolve.py",
        "experiments/llama3_8b.py",
        "experiments/digits.py",
        "experiments/retention.py",
    }
    assert all((ROOT / name).is_file() for name in scripts)
