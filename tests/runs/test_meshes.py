"""Whole runs on eight virtual devices against one, and on to other devices half-way."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cycleqd_jax.models.convert import load_model, save_model
from cycleqd_jax.models.llama import init_params
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.family import Family
from cycleqd_jax.runs.records.files import read_json, write_json_atomic
from cycleqd_jax.runs.records.jsonl import read_jsonl

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("meshed_run.py")


class Runs:
    """Starts runs of one config, each in a process with its own devices."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.folder = folder
        self._config = folder / "config.json"
        write_json_atomic(self._config, config.to_json())

    def start(self, name: str, mesh: str, *last: str, devices: int = 8) -> dict[str, Any]:
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        run = self.folder / name
        done = subprocess.run(
            [sys.executable, str(PROGRAM), str(self._config), str(run), mesh, *last],
            env={**os.environ, "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert found["devices"] == devices
        return found


@pytest.fixture(scope="module")
def runs(config: RunConfig, family: Family, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of a family like the others' tiny one, but with two key heads, that can be split."""
    folder = tmp_path_factory.mktemp("meshes")
    architecture = replace(
        load_model(family.base)[0], num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
    )
    base, *changes = (init_params(jax.random.key(seed), architecture) for seed in range(4))
    save_model(folder / "base", architecture, base, like=family.base)
    for name, change in zip(config.experts, changes, strict=True):
        expert = jax.tree.map(lambda weight, step: weight + 0.3 * step, base, change)
        save_model(folder / name, architecture, expert, like=family.base)
    # Six children: eight devices do not divide them.
    settings = replace(
        config,
        base=str(folder / "base"),
        experts={name: str(folder / name) for name in config.experts},
        generations=2,
        children=6,
        checkpoint_every=1,
    )
    return Runs(settings, folder)


@pytest.fixture(scope="module")
def alone(runs: Runs) -> Path:
    found = runs.start("alone", "1x1", devices=1)
    assert found["on each"] == [found["weights"]]
    return runs.folder / "alone"


def outcome(run: Path) -> dict[str, Any]:
    """What was bred, said and scored; no times."""
    said = {}
    for path in sorted((run / "transcripts").iterdir()):
        for row in read_jsonl(path):
            key = (path.name, row["task"], row["problem"], row["candidate"])
            said[key] = [step["answer"] for step in row["steps"] if step["step"] == "turn"]
    assert len({answer for answers in said.values() for answer in answers}) > 50
    return {
        "lineage": [{**row, "time": 0} for row in read_jsonl(run / "lineage.jsonl")],
        "said": said,
        "summary": {**read_json(run / "summary.json"), "seconds": 0},
        "finals": read_json(run / "finals.json"),
    }


def assert_equal(run: Path, expected: Path) -> None:
    found = outcome(run)
    for name, value in outcome(expected).items():
        assert found[name] == value, f"{name} differ"


def apart(run: Path, expected: Path) -> float:
    """The largest difference of the weights that two runs put forward."""
    pairs = ((load_model(r / name)[1] for r in (run, expected)) for name in ("best", "aggregate"))
    return max(
        float(np.abs(a - b).max())
        for one, other in pairs
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def test_candidates_over_eight_devices_change_no_bit(runs: Runs, alone: Path) -> None:
    found = runs.start("wide", "8x1")
    assert found["on each"] == [found["weights"]]
    assert_equal(runs.folder / "wide", alone)
    assert apart(runs.folder / "wide", alone) == 0.0


def test_split_weights_change_no_word(runs: Runs, alone: Path) -> None:
    found = runs.start("split", "4x2")
    (share,) = found["on each"]
    assert share < 0.52 * found["weights"]  # norm vectors are everywhere
    assert_equal(runs.folder / "split", alone)
    assert apart(runs.folder / "split", alone) < 1e-6


def test_a_run_goes_on_where_there_are_more_devices(runs: Runs, alone: Path) -> None:
    assert runs.start("moved", "1x1", "1", devices=1)["interrupted"]
    assert "interrupted" not in runs.start("moved", "8x1")
    assert_equal(runs.folder / "moved", alone)
