"""A search while it runs: loggers, pictures, device memory, a profile, and a stop between steps."""

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
import rich

from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.runs.records.folder import RunFolder
from cycleqd_jax.runs.records.jsonl import read_jsonl
from cycleqd_jax.runs.watching.curves import plot_curves
from cycleqd_jax.runs.watching.drawing import Numbers
from cycleqd_jax.runs.watching.loggers import Logger, open_loggers, scalars_of
from cycleqd_jax.runs.watching.pictures import ArchivePicture, plot_archives
from cycleqd_jax.runs.watching.watch import Watch

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Inside the block a first Ctrl-C (or SIGTERM) only asks to stop; a second one stops at once.

    Outside of the main thread, which alone hears signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._ask) for each in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        rich.print("stopping after this generation, with a checkpoint; Ctrl-C again stops at once")

    def _restore(self) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}


class Monitor:
    """Watches the generations of one start: ``with monitor.watching(3, 60): monitor.step(…)``.

    Args:
        watch: what is asked for.
        folder: the run's; None where nothing is written, whatever is asked for.
        tasks: the tasks' names.
        config: what the run was started with, for the loggers.
    """

    def __init__(
        self,
        watch: Watch,
        folder: RunFolder | None,
        tasks: Sequence[str],
        config: Mapping[str, Any],
    ) -> None:
        # Where nothing is written, all there is to do is to listen for Ctrl-C.
        self._watch = Watch(pictures_every=0) if folder is None else watch
        self._folder = folder
        self._tasks = list(tasks)
        self._config = config
        self._interrupts = Interrupts()
        self._loggers: list[Logger] = []
        self._profile_from: int | None = None
        self._profiling = False

    def watching(self, done: int, generations: int) -> "Monitor":
        """Say where this start begins and ends; returns itself, to be entered.

        Args:
            done: generations that are in a checkpoint.
            generations: of the whole run.
        """
        self._done = done
        if self._watch.profile and done < generations:
            # The first generation of a start compiles, which would fill the trace.
            self._profile_from = min(done + 1, generations - 1)
        return self

    def __enter__(self) -> "Monitor":
        with ExitStack() as opening:  # what is open already is closed if the rest does not open
            for logger in self._open_loggers():
                opening.callback(logger.close)
                self._loggers.append(logger)
            opening.callback(self._stop_profile)
            opening.enter_context(self._interrupts)
            self._profile(self._done)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def step(
        self,
        row: Mapping[str, Any],
        repertoire: CyclicRepertoire,
        expert_scores: Mapping[str, Numbers],
    ) -> bool:
        """Show a generation that has ended, and return whether the run has to stop here.

        Args:
            row: its metrics, written to ``metrics.jsonl`` already.
            repertoire: as it is now.
            expert_scores: expert name → K scores.
        """
        generation = row["generation"]
        self._stop_profile()
        if self._loggers:
            scalars = scalars_of(row, self._tasks)
            for logger in self._loggers:
                logger.log(generation, scalars)
        every = self._watch.pictures_every
        if every and generation % every == 0 and self._folder is not None:
            draw_run(self._folder, repertoire, self._tasks, expert_scores, generation)
        self._profile(generation)
        return self._interrupts.asked

    def _open_loggers(self) -> Iterator[Logger]:
        if self._folder is not None:
            yield from open_loggers(self._watch.log, self._folder.path, self._config, self._done)

    def _profile(self, generation: int) -> None:
        if generation == self._profile_from and self._folder is not None:
            target = self._folder.path / "profile"
            jax.profiler.start_trace(str(target), create_perfetto_trace=True)
            self._profiling = True

    def _stop_profile(self) -> None:
        if self._profiling:
            self._profiling = False
            jax.profiler.stop_trace()


def draw_run(
    folder: RunFolder,
    repertoire: CyclicRepertoire,
    tasks: Sequence[str],
    expert_scores: Mapping[str, Numbers],
    generations: int,
    best: Numbers = None,
) -> None:
    """Draw the archives and the curves of a run as they are.

    Args:
        folder: the run's.
        repertoire: its archives.
        tasks: the tasks' names.
        expert_scores: expert name → K scores.
        generations: how many were bred.
        best: K scores of the model chosen in the end; None before the end.
    """
    picture = ArchivePicture.of(
        repertoire, tasks, experts=expert_scores, best=best, generations=generations
    )
    plot_archives(folder.archives_picture, picture)
    plot_curves(folder.curves_picture, read_jsonl(folder.metrics_file), tasks, expert_scores)


def device_memory() -> dict[str, int]:
    """Bytes "in_use", "peak" and "limit" of the fullest local device.

    Empty where devices do not count their memory, as CPUs do not.
    """
    every = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    return {
        short: max(stats[name] for stats in every)
        for short, name in names.items()
        if every and all(name in stats for stats in every)
    }


def progress_note(row: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """What is worth a look while one waits: coverage, best per skill, pace, phases, memory."""
    bests = " ".join(f"{task} {best:.2f}" for task, best in zip(tasks, row["best"], strict=True))
    parts = [
        f"coverage {np.mean(row['coverage']):.0%}",
        f"best {bests} mean {row['best_mean']:.2f}",
        f"{row['tokens_per_second']:,.0f} tok/s",
        " ".join(f"{phase} {s:.1f}s" for phase, s in row["seconds"].items() if s >= 0.05),
    ]
    if "hosts" in row:
        parts.append(f"hosts wait up to {max(row['hosts']['waiting']):.0%}")
    memory = row.get("device_memory", {})
    if {"peak", "limit"} <= memory.keys():
        parts.append(f"memory {memory['peak'] / 1e9:.1f}/{memory['limit'] / 1e9:.0f} GB")
    return "  ".join(part for part in parts if part)
