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

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert len(blocks) == 5
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
        "experiments/digits.py",
        "experiments/retention.py",
    }
    assert all((ROOT / name).is_file() for name in scripts)
