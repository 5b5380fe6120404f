"""Runs of several real processes, joined over gloo on this machine."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.records.files import read_json, write_json_atomic
from cycleqd_jax.runs.records.jsonl import read_jsonl
from cycleqd_jax.runs.records.transcripts import read_transcripts
from cycleqd_jax.tasks.transcript import Turn

PROGRAM = Path(__file__).with_name("hosts_run.py")
# Four processes that compile side by side on two busy cores.
_PATIENCE = 900.0


class Runs:
    """Starts runs of one config as groups of processes."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.folder = folder
        self._config = folder / "config.json"
        write_json_atomic(self._config, config.to_json())

    def start(self, run: Path, count: int, **environment: str) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, str(PROGRAM), str(self._config), str(run)]
        command.append(str(self.folder / "cache"))
        started = []
        for process in range(count):
            place = [port, str(process), str(count)] if count > 1 else []
            # The others need not see the folder of process 0.
            out = [str(run)] if process == 0 else [str(self.folder / "nowhere" / "run")]
            with open(self.log(process), "wb") as log:
                started.append(
                    subprocess.Popen(
                        [*command[:3], *out, *command[4:], *place],
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        env={**os.environ, **environment},
                    )
                )
        return started

    def finish(self, run: Path, count: int) -> str:
        """Run to the end; the digest of the repertoire, the same in all processes."""
        started = self.start(run, count)
        printed = [each.communicate(timeout=_PATIENCE)[0] for each in started]
        for process, each in enumerate(started):
            assert each.returncode == 0, self.errors(process)
        lines = [line for text in printed for line in text.splitlines()]
        digests = [line for line in lines if line.startswith("repertoire")]
        assert len(digests) == count
        assert len(set(digests)) == 1
        return digests[0]

    def log(self, process: int) -> Path:
        return self.folder / f"log-{process}.txt"

    def errors(self, process: int) -> str:
        return self.log(process).read_text()


def outcome(run: Path) -> dict[str, Any]:
    """Everything a run leaves behind but times and who played what."""
    times = ("seconds", "hosts", "tokens_per_second")
    metrics = [
        {name: value for name, value in row.items() if name not in times}
        for row in read_jsonl(run / "metrics.jsonl")
    ]
    return {
        "lineage": [json.dumps({**row, "time": 0}) for row in read_jsonl(run / "lineage.jsonl")],
        "metrics": [json.dumps(row) for row in metrics],
        "summary": {**read_json(run / "summary.json"), "seconds": 0},
        "finals": {**read_json(run / "finals.json"), "command": 0},
        "models": [(run / n / "model.safetensors").read_bytes() for n in ("best", "aggregate")],
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
    }


def transcripts(run: Path) -> dict[str, list[Any]]:
    """What was said and scored; two programs of a pipe write to stderr in any order."""
    found = {}
    for path in (run / "transcripts").iterdir():
        rows = read_transcripts(path)
        said = [[step for step in t.steps if isinstance(step, Turn)] for t in rows]
        ends = [(t.task, t.problem, t.candidate, t.repeat, t.score, t.ended) for t in rows]
        found[path.name] = list(zip(ends, said, strict=True))
    return found


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        assert found[name] == value, f"{name} differ"


@pytest.fixture(scope="module")
def runs(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(config, tmp_path_factory.mktemp("hosts"))


EXCHANGE = """
import os, signal, sys
import numpy as np
from cycleqd_jax.runs.hosts.joining import joined_hosts

port, process = sys.argv[1:]
with joined_hosts(f"127.0.0.1:{port}", int(process), 2) as hosts:
    name = "ab"[hosts.index] * (1 + 20_000 * hosts.index)
    rows = hosts.gather({"name": name, "row": np.arange(3) + hosts.index}, "rows")
    assert [row["name"][0] for row in rows] == ["a", "b"]
    assert len(rows[1]["name"]) == 20_001
    assert [row["row"].tolist() for row in rows] == [[0, 1, 2], [1, 2, 3]]
    large = np.arange(5_000_000, dtype=np.int32) if hosts.first else None
    found = hosts.broadcast({"large": large, "small": None})
    assert found["large"].sum(dtype=np.int64) == 12_499_997_500_000
    spent = hosts.waiting()
    assert len(spent["busy"]) == 2 and max(spent["waiting"]) < 1
    if hosts.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    hosts.gather(None, "nothing more")
"""


def test_two_processes_gather_and_one_does_not_wait_for_a_dead_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", EXCHANGE, port, str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    said = [each.communicate(timeout=_PATIENCE)[0] for each in started]
    assert [each.returncode for each in started] == [2, -signal.SIGKILL], said
    assert "process 0 of 2: process 1 of 2 is lost" in said[0]
    assert "start the same command again on every host" in said[0]


@pytest.mark.slow
def test_two_processes_end_as_one_does(runs: Runs, finished: Path) -> None:
    run = runs.folder / "two"
    runs.finish(run, 2)
    assert_equal(outcome(run), outcome(finished))
    for row in read_jsonl(run / "metrics.jsonl"):
        assert len(row["hosts"]["busy"]) == 2
        assert all(0 <= share <= 1 for share in row["hosts"]["waiting"])
    assert not (runs.folder / "nowhere").exists()


@pytest.fixture(scope="module")
def long(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Long enough to be killed, with words that are drawn and problems that do not divide."""
    settings = replace(
        config, generations=6, problems=3, checkpoint_every=1, temperature=1.0, repeats=2
    )
    return Runs(settings, tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module")
def whole(long: Runs) -> tuple[Path, str]:
    """A run of one process."""
    return long.folder / "whole", long.finish(long.folder / "whole", 1)


@pytest.mark.slow
def test_four_processes_end_as_one_does(long: Runs, whole: tuple[Path, str]) -> None:
    run = long.folder / "four"
    assert long.finish(run, 4) == whole[1]
    assert_equal(outcome(run), outcome(whole[0]))
    assert_equal(transcripts(run), transcripts(whole[0]))


def wait_for_generation(run: Path, generation: int) -> None:
    deadline = time.monotonic() + _PATIENCE
    while len(read_jsonl(run / "metrics.jsonl")) < generation:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "victim", "how", "then"),
    [
        (2, 0, signal.SIGKILL, (1,)),
        (2, 1, signal.SIGKILL, (2,)),
        (4, 2, signal.SIGSTOP, (4,)),
        (4, 0, signal.SIGSTOP, (2, 1)),
    ],
)
def test_one_is_lost_the_others_end_and_the_run_goes_on(
    long: Runs,
    whole: tuple[Path, str],
    count: int,
    victim: int,
    how: signal.Signals,
    then: Sequence[int],
) -> None:
    dice, run = random.Random(victim), long.folder / f"lost-{victim}-{count}"
    started = long.start(run, count)
    wait_for_generation(run, 2)
    time.sleep(dice.uniform(0.0, 1.0))
    lost = time.monotonic()
    started[victim].send_signal(how)
    try:
        for process, each in enumerate(started):
            if process != victim:
                each.communicate(timeout=60 - (time.monotonic() - lost))
                assert each.returncode == 2
                said = long.errors(process)
                assert f"process {process} of {count}: process {victim} of {count} is lost" in said
                assert "start the same command again on every host" in said
    finally:
        for each in started:
            each.kill()
            each.communicate()
    for number, processes in enumerate(then):
        if number + 1 < len(then):  # stopped again, in peace, by one of them
            done = len(read_jsonl(run / "metrics.jsonl"))
            started = long.start(run, processes)
            wait_for_generation(run, done + 1)
            started[-1].send_signal(signal.SIGINT)
            for each in started:
                each.communicate(timeout=_PATIENCE)
                assert each.returncode == 130
        else:
            assert long.finish(run, processes) == whole[1]
    assert_equal(outcome(run), outcome(whole[0]))


@pytest.mark.slow
def test_a_refusal_of_one_ends_all(runs: Runs) -> None:
    run = runs.folder / "foreign"
    run.mkdir()
    (run / "stranger.txt").write_text("mine")
    for process, each in enumerate(runs.start(run, 2)):
        each.communicate(timeout=_PATIENCE)
        assert each.returncode == 2
        assert "stranger.txt" in runs.errors(process)
    assert sorted(path.name for path in run.iterdir()) == ["stranger.txt"]
