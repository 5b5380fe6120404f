"""A search that is watched: it stops between generations, draws, logs, is profiled."""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.evaluate import Evaluator
from cycleqd_jax.runs.records.folder import RunFolder
from cycleqd_jax.runs.records.jsonl import read_jsonl
from cycleqd_jax.runs.watching import monitor as module
from cycleqd_jax.runs.watching.monitor import Interrupts, Monitor, device_memory, progress_note
from cycleqd_jax.runs.watching.watch import Watch

ROW: dict[str, Any] = {
    "generation": 1,
    "coverage": [0.25, 0.75],
    "best": [0.5, 1.0],
    "best_mean": 0.625,
    "tokens_per_second": 1234.5,
    "seconds": {"emit": 0.001, "model": 2.0},
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_asks_and_a_second_one_stops(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        assert not interrupts.asked
        os.kill(os.getpid(), number)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
    assert "after this generation, with a checkpoint" in capsys.readouterr().out.replace("\n", " ")


def test_a_thread_leaves_the_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_the_note_shows_what_is_worth_a_look() -> None:
    note = progress_note(ROW, ["coding", "shell"])
    assert note == ("coverage 50%  best coding 0.50 shell 1.00 mean 0.62  1,234 tok/s  model 2.0s")
    memory = {"in_use": 1, "peak": 20_500_000_000, "limit": 80_000_000_000}
    assert progress_note({**ROW, "device_memory": memory}, ["a", "b"]).endswith("memory 20.5/80 GB")


def test_memory_is_that_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(stats: dict[str, int] | None) -> SimpleNamespace:
        return SimpleNamespace(memory_stats=lambda: stats)

    stats = [
        {"bytes_in_use": used, "peak_bytes_in_use": used + 1, "bytes_limit": 9} for used in (3, 5)
    ]
    monkeypatch.setattr(module.jax, "local_devices", lambda: [device(s) for s in stats])
    assert device_memory() == {"in_use": 5, "peak": 6, "limit": 9}
    monkeypatch.setattr(module.jax, "local_devices", lambda: [device(None)])
    assert device_memory() == {}


@pytest.mark.parametrize(
    ("done", "generations", "expected"), [(0, 5, [(1, 2)]), (3, 5, [(4, 5)]), (4, 5, [(4, 5)])]
)
def test_a_profile_leaves_out_the_generation_that_compiles_if_it_can(
    done: int,
    generations: int,
    expected: list[tuple[int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing = object.__new__(CyclicRepertoire)  # nobody looks at it: nothing is drawn
    now, traced, drawn = [done], [], []
    profiler = SimpleNamespace(
        start_trace=lambda folder, create_perfetto_trace: traced.append([folder, now[0]]),
        stop_trace=lambda: traced[-1].append(now[0]),
    )
    monkeypatch.setattr(module.jax, "profiler", profiler)
    monkeypatch.setattr(module, "draw_run", lambda *args: drawn.append(args[-1]))
    with RunFolder.open(tmp_path / "run", {}) as folder:
        monitor = Monitor(Watch(profile=True, pictures_every=2), folder, ["a", "b"], {})
        with monitor.watching(done, generations):
            for generation in range(done + 1, generations + 1):
                now[0] = generation
                assert not monitor.step({**ROW, "generation": generation}, nothing, {})
    assert [(start, stop) for _, start, stop in traced] == expected
    assert traced[0][0] == str(tmp_path / "run" / "profile")
    assert drawn == [g for g in range(done + 1, generations + 1) if g % 2 == 0]


@pytest.mark.slow
def test_ctrl_c_keeps_the_generation_and_the_same_command_goes_on(
    config: RunConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboardX")
    from cycleqd_jax.runs.driver import evolve

    real, calls = Evaluator.population, []

    def interrupted(self: Evaluator, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1 + 1:  # the experts, then the first generation
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    out, watch = tmp_path / "run", Watch(log=("tensorboard",), pictures_every=1, profile=True)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "population", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evolve(config, out, watch=watch)
    assert len(read_jsonl(out / "metrics.jsonl")) == 1
    assert (out / "checkpoints" / "1").exists() or any((out / "checkpoints").glob("*1*"))
    assert (out / "archives.png").read_bytes().startswith(b"\x89PNG")
    evolve(replace(config), out, watch=watch)
    ours, theirs = (
        [{**row, "time": 0} for row in read_jsonl(run / "lineage.jsonl")] for run in (out, finished)
    )
    assert ours == theirs
    assert len(list((out / "tensorboard").glob("events.*"))) == 2
    traces = list((out / "profile").rglob("*"))
    assert any(path.name == "perfetto_trace.json.gz" for path in traces)
    assert any(path.name.endswith(".xplane.pb") for path in traces)
