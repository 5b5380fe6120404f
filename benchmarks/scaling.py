"""One generation on 1 to 256 hosts: measured with 1, 2 and 4 processes, simulated beyond.

    python benchmarks/scaling.py [--generations 6] [--cache DIR] [--json FILE]

Breeds the quickstart's family (made first where the cache lacks it) with 1, 2 and 4 processes on
this machine, each bound to one core, and compares seconds a generation. Then it measures, with one
process, how long the part of a generation takes that one of n hosts would play, what differs
between the hosts' parts, what is done by every host, and what a gather costs; from these it says
what a generation would take on n hosts. The assumptions are printed with the table.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from measuring import Row, best_of, row, write_rows

from cycleqd_jax.cache import default_cache
from cycleqd_jax.runs.breeding import first_parents, make_emitter
from cycleqd_jax.runs.compilation import cache_compilations
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.driver import evolve
from cycleqd_jax.runs.evaluate import Evaluator
from cycleqd_jax.runs.hosts.division import Costs, deal, work_done
from cycleqd_jax.runs.hosts.joining import joined_hosts
from cycleqd_jax.runs.quickstart import quickstart_config
from cycleqd_jax.runs.rebuild import rebuild
from cycleqd_jax.runs.records.files import read_json, write_json_atomic
from cycleqd_jax.runs.records.jsonl import read_jsonl
from cycleqd_jax.runs.records.lineage import FamilyTree, read_births
from cycleqd_jax.runs.records.transcripts import read_transcripts
from cycleqd_jax.runs.workspace import Workspace, open_workspace
from cycleqd_jax.sandbox import open_sandbox
from cycleqd_jax.sandbox.memo import MemoSandbox
from cycleqd_jax.tasks.benchmark import sandbox_limits

MEASURED = (1, 2, 4)
SIMULATED = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Of a cluster, assumed: what a message takes at least, and 25 Gbit/s.
NETWORK_SECONDS = 50e-6
NETWORK_BYTES = 25e9 / 8
# Gathers of a generation (`Division`, `Search`), each of two or more collectives.
GATHERS = 3


@dataclass(frozen=True)
class Measured:
    """What one size of group took.

    Attributes:
        generation: seconds from one generation to the next.
        play: of these, playing.
        waiting: the largest share of its time that a process waits.
        gather: seconds of one gather of what a generation's scores need.
    """

    generation: float
    play: float
    waiting: float
    gather: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--generations", type=int, default=6, help="of every measured run, from 3")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--transcripts", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        port, process, count, file, run = options.worker
        where = None if count == "1" else (f"127.0.0.1:{port}", int(process), int(count))
        work(where, Path(file), Path(run), options.cache, options.transcripts)
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    config = replace(  # as little as possible after the search
        quickstart_config(options.cache, generations=options.generations),
        finalists=1,
        final_problems=1,
        test_problems=1,
        uniform_scales=(0.5,),
    )
    with tempfile.TemporaryDirectory() as folder:
        runs = {n: Path(folder) / f"run-{n}" for n in MEASURED}
        found = {n: measure(config, run, options.cache, n, cores) for n, run in runs.items()}
        # Once more with what the simulation is told; writing it would count as a generation's time.
        recorded = Path(folder) / "recorded"
        measure(config, recorded, options.cache, 1, cores, transcripts=True)
        print(f"measured on {len(cores)} cores, each process bound to one of them, loopback:")
        print(f"  {'processes':>9s} {'s a generation':>15s} {'speed':>6s} {'longest wait':>13s}")
        for n, each in found.items():
            speed = found[1].generation / each.generation
            print(f"  {n:9d} {each.generation:15.3f} {speed:6.2f} {each.waiting:13.0%}")
        rows = [
            row(
                f"{n} processes, measured",
                each.generation,
                found[1].generation,
                "1 process",
                "s a generation",
                found[1].generation / min(n, len(cores)),
                waiting=each.waiting,
            )
            for n, each in found.items()
        ]
        rows += simulate(config, recorded, options.cache, found)
    write_rows(options.json, rows)


def measure(
    config: RunConfig,
    run: Path,
    cache: Path,
    count: int,
    cores: Sequence[int],
    *,
    transcripts: bool = False,
) -> Measured:
    """Run it with some processes."""
    file = run.with_suffix(".json")
    write_json_atomic(file, config.to_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--cache", str(cache)]
    command += [*(["--transcripts"] if transcripts else []), "--worker", str(port)]
    started = []
    for process in range(count):
        more = [str(process), str(count), str(file), str(run)]
        pipe = subprocess.PIPE if process == 0 else subprocess.DEVNULL
        core = cores[process % len(cores)]
        bound = ["taskset", "-c", str(core), *command, *more]
        started.append(subprocess.Popen(bound, stdout=pipe, text=True))
    printed, _ = started[0].communicate()
    if any(each.wait() for each in started):
        raise RuntimeError(f"{count} processes: one of them has failed")
    births = read_jsonl(run / "lineage.jsonl")
    ends = [
        max(b["time"] for b in births if b["generation"] == g)
        for g in range(1, config.generations + 1)
    ]
    metrics = read_jsonl(run / "metrics.jsonl")[1:]  # the first generation compiles
    return Measured(
        generation=median(np.diff(ends)),
        play=median(r["seconds"]["model"] + r["seconds"]["sandbox"] for r in metrics),
        waiting=max(median(w) for w in zip(*(_waiting(r) for r in metrics), strict=True)),
        gather=float(printed.split("gather ")[-1].split()[0]) if count > 1 else 0.0,
    )


def _waiting(metrics: Mapping[str, Any]) -> list[float]:
    return list(metrics.get("hosts", {"waiting": [0.0]})["waiting"])


def work(
    where: tuple[str, int, int] | None, file: Path, run: Path, cache: Path, transcripts: bool
) -> None:
    """One process of a measured run."""
    cache_compilations(cache)
    config = RunConfig.from_json(read_json(file))
    with joined_hosts(*(where or ())) as hosts:
        evolve(config, run, transcripts=transcripts, cache=cache, hosts=hosts)
        scores = np.zeros((len(config.tasks), config.children, config.problems), np.float32)
        seconds = best_of(20, lambda: hosts.gather(scores, "scores"))
        print(f"gather {seconds}", flush=True)


def simulate(config: RunConfig, run: Path, cache: Path, found: Mapping[int, Measured]) -> list[Row]:
    """What a generation takes on up to 256 hosts like this core."""
    workspace = open_workspace(config, cache)
    problems = workspace.problems("search", config.problems, config.seed)
    last = config.generations
    before, now = (work_of(run, config, generation) for generation in (last - 1, last))
    costs, seconds = Costs(), read_jsonl(run / "metrics.jsonl")[-1]["seconds"]
    learned = {task: episodes.sum(axis=0) for task, episodes in before.items()}
    costs.learn(problems, learned, seconds["model"], seconds["sandbox"])
    expected = costs.of(problems)
    totals = sum(episodes.sum(axis=(0, 1)) for episodes in now.values())
    prices = np.array([seconds["model"], seconds["sandbox"]]) / np.maximum(totals[1:], 1e-9)
    true = {task: episodes[:, :, 1:] @ prices for task, episodes in now.items()}
    parents, gains = (children_of(workspace, run, config, g) for g in (last - 1, last))
    everything = {task: np.ones((config.children, config.problems), bool) for task in true}
    serial = found[1].generation - found[1].play
    message = 4.0 * config.children * config.problems * len(config.tasks)
    rows, single = [], 0.0
    print(
        f"\nsimulated: hosts like one core of this machine; every host breeds, and process 0 logs "
        f"and\nwrites, for {serial * 1e3:.0f} ms; a typical host's part is played here for real, "
        "and the slowest host\ntakes longer as its episodes' measured costs say; "
        f"{GATHERS} gathers a generation, each {found[2].gather * 1e3:.1f} ms with\n2 processes "
        f"(measured) and {2 * NETWORK_SECONDS * 1e6:.0f} us more for every further host, with "
        f"{message / 1e3:.0f} kB at {NETWORK_BYTES * 8 / 1e9:.0f} Gbit/s\n(assumed, a ring)"
    )
    heads = ("hosts", "play", "imbalance", "serial", "gather", "generation", "speed", "of ideal")
    print("  " + " ".join(f"{head:>10s}" for head in heads))
    limits = sandbox_limits(workspace.tasks)
    with MemoSandbox(open_sandbox(config.sandbox, limits)) as sandbox:
        evaluator = Evaluator(workspace, sandbox)
        # Every host begins with the texts of the generations before in its sandbox's memory.
        evaluator.population(parents, problems, phase="before")
        known = sandbox.known()
        for hosts in SIMULATED:
            owner = deal(expected, everything, hosts)
            loads = np.zeros(hosts)
            for task, who in owner.items():
                np.add.at(loads, who, true[task])
            typical = int(np.argmin(np.abs(loads - loads.mean())))
            mine = {task: who == typical for task, who in owner.items()}

            def play(mine: Mapping[str, np.ndarray] = mine) -> None:
                sandbox.forget(but=known)
                evaluator.population(gains, problems, phase="generation", chosen=mine)

            imbalance = float(loads.max() / loads[typical])
            played = best_of(3, play)
            gather = 0.0
            if hosts > 1:
                further = 2 * NETWORK_SECONDS + message / hosts / NETWORK_BYTES
                gather = GATHERS * (found[2].gather + (hosts - 2) * further)
            total = played * imbalance + serial + gather
            single = single or total
            rows.append(
                row(
                    f"{hosts} hosts, simulated",
                    total,
                    single,
                    "1 host",
                    "s a generation",
                    single / hosts,
                    play=played,
                    imbalance=imbalance,
                    serial=serial,
                    gather=gather,
                )
            )
            shown = (played, imbalance, serial, gather, total, single / total)
            print(
                f"  {hosts:10d} "
                + " ".join(f"{value:10.3f}" for value in shown)
                + f" {single / total / hosts:10.0%}"
            )
    return rows


def work_of(run: Path, config: RunConfig, generation: int) -> dict[str, np.ndarray]:
    """Task → (candidates, problems, 3): episodes, characters, seconds of environments."""
    shape = (config.children, config.problems, 3)
    found = {task: np.zeros(shape) for task in config.tasks}
    for each in read_transcripts(run / "transcripts" / f"generation-{generation:06d}.jsonl"):
        found[each.task][each.candidate, each.problem] += work_done(each)
    return found


def children_of(workspace: Workspace, run: Path, config: RunConfig, generation: int) -> Any:
    """The children of a generation, bred again."""
    births = read_births(run / "lineage.jsonl")
    first = [birth for birth in births if birth.generation == 0]
    scores = np.array([[b.scores[task] for task in config.tasks] for b in first], np.float32)
    ids = [birth.id for birth in births if birth.generation == generation]
    emitter = make_emitter(workspace, scores)
    return rebuild(FamilyTree(births), ids, emitter, first_parents(workspace))


if __name__ == "__main__":
    main()
