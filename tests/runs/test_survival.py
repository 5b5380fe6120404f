"""Runs as processes: killed at any moment, two on one folder, a full disk, other devices."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cycleqd_jax.qd.presets import DEFAULT
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.records.files import read_json, write_json_atomic
from cycleqd_jax.runs.records.jsonl import read_jsonl

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("killed_run.py")
KILLS = 20
CHEAP_KILLS = 4


class Runs:
    """Starts runs of one config."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.folder = folder
        self.config = config
        self._config = folder / "config.json"
        write_json_atomic(self._config, config.to_json())

    def start(self, run: Path, event: int | None = None, **environment: str) -> Any:
        command = [sys.executable, str(PROGRAM), str(self._config), str(run)]
        command += [str(self.folder / "cache"), *([] if event is None else [str(event)])]
        with open(self.folder / "log.txt", "wb") as log:
            return subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **environment},
            )

    def finish(self, run: Path, **environment: str) -> dict[str, str]:
        """Runs to the end and returns what the program printed."""
        process = self.start(run, None, **environment)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, self.errors()
        lines = [line.split(maxsplit=1) for line in printed.splitlines()]
        return {line[0]: line[1] for line in lines if line and line[0] in ("events", "repertoire")}

    def errors(self) -> str:
        return (self.folder / "log.txt").read_text()


@pytest.fixture(scope="module")
def runs(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    settings = replace(
        config,
        generations=12,
        problems=20,
        final_problems=20,
        finalists=6,
        checkpoint_every=1,
        checkpoint_archive=5,
        preset=replace(DEFAULT, bins=5, schedule="child"),
    )
    return Runs(settings, tmp_path_factory.mktemp("survival"))


@pytest.fixture(scope="module")
def whole(runs: Runs) -> tuple[Path, dict[str, str]]:
    """A run that nobody disturbed."""
    return runs.folder / "whole", runs.finish(runs.folder / "whole")


def outcome(run: Path) -> dict[str, Any]:
    """Everything a run leaves behind but wall times."""
    lineage = [{**row, "time": 0} for row in read_jsonl(run / "lineage.jsonl")]
    metrics = [{**row, "seconds": 0} for row in read_jsonl(run / "metrics.jsonl")]
    summary = {**read_json(run / "summary.json"), "seconds": 0}
    models = [(run / n / "model.safetensors").read_bytes() for n in ("best", "aggregate")]
    finals = read_json(run / "finals.json")
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    # As text: a score that is not a number equals itself there.
    return {
        "lineage": [json.dumps(row) for row in lineage],
        "metrics": [json.dumps(row) for row in metrics],
        "finals": json.dumps([summary, finals]),
        "models": models,
        "files": sorted(path.name for path in run.iterdir()),
        "checkpoints": kept,
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        assert found[name] == value, f"{name} differ"


def test_a_run_killed_at_twenty_moments_ends_as_if_nothing_had_happened(
    runs: Runs, whole: tuple[Path, dict[str, str]]
) -> None:
    reference, printed = whole
    expected, events = outcome(reference), int(printed["events"])
    assert expected["checkpoints"] == [f"generation_{g:06d}" for g in (5, 10, 11, 12)]
    assert any("NaN" in row for row in expected["lineage"])
    dice, kills, number = random.Random(0), 0, 0
    while kills < KILLS:
        run = runs.folder / f"killed-{number}"
        number += 1
        done = False
        while kills < KILLS and not done:
            if kills % 2:  # at a moment of the clock, C++ code included
                process = runs.start(run)
                assert process.stdout.readline() == "started\n"
                time.sleep(dice.uniform(0.5, 6.0))
                process.kill()
            else:  # at an access to a file, so that no kind of moment is left out
                process = runs.start(run, dice.randint(1, events))
            process.communicate(timeout=300)
            done = process.returncode == 0
            assert done or process.returncode == -signal.SIGKILL, runs.errors()
            kills += not done
        assert runs.finish(run).get("repertoire", printed["repertoire"]) == printed["repertoire"]
        assert_equal(outcome(run), expected)


def test_a_killed_run_of_cheaper_fitness_ends_as_if_nothing_had_happened(
    runs: Runs, tmp_path: Path
) -> None:
    settings = replace(runs.config, racing=0.6, racing_block=3, subsets=(5, 10), growth=(4, 8))
    cheap = Runs(settings, tmp_path)
    printed = cheap.finish(tmp_path / "whole")
    expected, events = outcome(tmp_path / "whole"), int(printed["events"])
    assert any('"problems": [5, 5, 5]' in row for row in expected["lineage"])
    dice, kills = random.Random(1), 0
    while kills < CHEAP_KILLS:
        run = tmp_path / "killed"
        process = cheap.start(run, dice.randint(1, events))
        process.communicate(timeout=300)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, cheap.errors()
        kills += 1
    assert kills
    assert cheap.finish(run).get("repertoire", printed["repertoire"]) == printed["repertoire"]
    assert_equal(outcome(run), expected)


def test_the_second_process_on_a_folder_is_refused(runs: Runs) -> None:
    run = runs.folder / "shared"
    first = runs.start(run)
    try:
        deadline = time.monotonic() + 120
        while not (run / "lineage.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        first.send_signal(signal.SIGSTOP)
        second = runs.start(run)
        second.communicate(timeout=300)
        assert second.returncode == 1
        assert f"in use by process {first.pid} on" in runs.errors()
    finally:
        first.kill()
        first.communicate()
    runs.finish(run)  # the killed one's lock is gone with it


def test_other_devices_end_the_run_the_same(runs: Runs, whole: tuple[Path, dict[str, str]]) -> None:
    reference, printed = whole
    run = runs.folder / "devices"
    process = runs.start(run, int(printed["events"]) // 2)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert list((run / "checkpoints").glob("generation_*"))
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    assert runs.finish(run, XLA_FLAGS=flags)["repertoire"] == printed["repertoire"]
    assert_equal(outcome(run), outcome(reference))


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(
    runs: Runs, whole: tuple[Path, dict[str, str]], small_disk: Callable[[int], Path]
) -> None:
    reference, printed = whole
    disk = small_disk(4)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes((4 << 20) - 250_000))
    process = runs.start(disk / "run")
    process.communicate(timeout=300)
    assert process.returncode == 1
    assert "NoSpaceError" in runs.errors()
    assert "make room and start the same command again" in runs.errors()
    for log in ("metrics.jsonl", "lineage.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            data = (disk / "run" / log).read_bytes()
            assert data.endswith(b"\n") or not data
    ballast.unlink()
    assert runs.finish(disk / "run")["repertoire"] == printed["repertoire"]
    assert_equal(outcome(disk / "run"), outcome(reference))
