"""What cheaper fitness saves: problems evaluated until the search is as far as with all of them.

    python benchmarks/fitness.py [--out runs/fitness] [--seeds 0 1 2 3 4] [--arms NAME ...]
                                 [--generations 30] [--horizons 30] [--json FILE]

Breeds the quickstart's family with its settings, once an arm and seed: full evaluation, and ways to
score children on fewer problems (`cycleqd_jax.runs.fitness`). Every run is a run folder below
--out: a script that was cut goes on where it stood. Then, per seed,

- the QD score (sum over the three archives) on all search problems, over the problems evaluated
  until then, the experts' and those of growing elites included. Generations of an arm that score on
  subsets have no such score and are left out, so that an arm is never flattered.
- how many problems an arm needs to reach the QD score that full evaluation ends with, against those
  that full evaluation needed to reach it first. --horizons ask the same for full evaluation of
  fewer generations: a run's beginning is the shorter run.
- the mean of `cycleqd/best` on the test split, which no search has met.
- how many of the programs that full evaluation judges had to run: the same program on the same
  files is known from before (`cycleqd_jax.sandbox.MemoSandbox`). That is another cost than the
  problems above, whose texts the model still says; scores are the same to the bit.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from measuring import Row, row, write_rows

from cycleqd_jax.cache import default_cache
from cycleqd_jax.runs.compilation import cache_compilations
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.evaluate import Evaluator
from cycleqd_jax.runs.quickstart import quickstart_config
from cycleqd_jax.runs.records.files import read_json, write_json_atomic
from cycleqd_jax.runs.records.folder import RunFiles, RunFolder
from cycleqd_jax.runs.records.jsonl import read_jsonl
from cycleqd_jax.runs.results.finalists import choose_finals
from cycleqd_jax.runs.search import Search
from cycleqd_jax.runs.watching.monitor import Monitor
from cycleqd_jax.runs.watching.watch import Watch
from cycleqd_jax.runs.workspace import open_workspace
from cycleqd_jax.sandbox import open_sandbox
from cycleqd_jax.sandbox.memo import MemoSandbox
from cycleqd_jax.tasks.benchmark import sandbox_limits

ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "racing, bound": {"racing": 1.0},
    "racing, 0.8": {"racing": 0.8, "racing_block": 4},
    "subsets": {"subsets": (16,), "growth": (11,)},
    "racing, 0.8, and subsets": {
        "racing": 0.8,
        "racing_block": 4,
        "subsets": (16,),
        "growth": (11,),
    },
}
"""Arm → the settings that differ from full evaluation."""

LONGER = {"racing, 0.8": 1.5, "racing, 0.8, and subsets": 1.5}
"""Arm → how many times as many generations it breeds: they cost less."""

_NEAR = 0.98


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    Attributes:
        problems: evaluated until the end of each generation, experts included.
        qd: the QD score on all search problems then; None where elites were scored on fewer.
        test: mean score of the best model on the test split.
        error: its standard error, the problems being drawn.
        seconds: of the search.
        memo: jobs answered from memory, jobs run; nothing of a run that went on after a break.
    """

    problems: list[int]
    qd: list[float | None]
    test: float
    error: float
    seconds: float
    memo: tuple[int, int]

    def reach(self, target: float) -> int | None:
        """Problems evaluated until the QD score was at least ``target``; None: never."""
        reached = [
            n for n, qd in zip(self.problems, self.qd, strict=True) if qd and qd >= target - 1e-6
        ]
        return reached[0] if reached else None


def main() -> None:
    """Run the arms and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/fitness"))
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--generations", type=int, default=30, help="of full evaluation")
    parser.add_argument("--horizons", type=int, nargs="+", help="default: all generations")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    cache_compilations(chosen.cache)
    full = quickstart_config(chosen.cache, generations=chosen.generations)
    outcomes: dict[str, dict[int, Outcome]] = {arm: {} for arm in chosen.arms}
    for seed in chosen.seeds:
        for arm in chosen.arms:
            generations = round(chosen.generations * LONGER.get(arm, 1.0))
            config = replace(full, seed=seed, generations=generations, **ARMS[arm])
            name = "-".join([*arm.replace(",", "").split(), str(seed)])
            outcomes[arm][seed] = found = play(config, chosen.out / name, chosen.cache)
            print(
                f"seed {seed}, {arm}: {found.problems[-1]} problems, QD score {found.qd[-1]:.2f}, "
                f"test {found.test:.3f} ± {found.error:.3f}, {found.seconds:.0f} s, "
                f"memo {found.memo[0]} of {sum(found.memo)}",
                flush=True,
            )
    rows: list[Row] = []
    if "full" in outcomes:
        whole = [run for run in outcomes["full"].values() if sum(run.memo)]
        rows += [memoised(whole)] if whole else []
        for horizon in chosen.horizons or [chosen.generations]:
            print(f"full evaluation of {horizon} generations:")
            rows += table(outcomes, horizon)
    write_rows(chosen.json, rows)


def play(config: RunConfig, out: Path, cache: Path) -> Outcome:
    """One run, or the rest of it: the search, the choice of the best, its test."""
    files, measured = RunFiles(out), out / "measured.json"
    if not measured.exists():
        started, whole = time.perf_counter(), not files.metrics_file.exists()
        with RunFolder.open(out, config.to_json()) as folder:
            workspace = open_workspace(config, cache)
            limits = sandbox_limits(workspace.tasks)
            with MemoSandbox(open_sandbox(config.sandbox, limits)) as sandbox:
                evaluator = Evaluator(workspace, sandbox)
                search = Search(
                    workspace,
                    evaluator,
                    folder,
                    Monitor(Watch(), folder, config.tasks, config.to_json()),
                )
                search.run()
                seconds, memo = time.perf_counter() - started, (sandbox.hits, sandbox.misses)
                finals = choose_finals(
                    workspace,
                    evaluator,
                    search.repertoire,
                    workspace.problems("validation", config.final_problems, config.seed),
                )
                best = jax.tree.map(lambda leaf: leaf[None], finals.best.gains)
                test = workspace.problems("test", config.test_problems, config.seed)
                played = evaluator.population(best, test, phase="test-cycleqd/best")
        scores = [played.solved[name][0] for name in config.tasks]
        means = [float(score.mean()) for score in scores]
        variance = sum(float(score.var(ddof=1)) / len(score) for score in scores)
        write_json_atomic(
            measured,
            {
                "test": sum(means) / len(means),
                "error": variance**0.5 / len(scores),
                "seconds": seconds,
                "memo": memo if whole else (0, 0),
            },
        )
    rest = read_json(measured)
    rows = read_jsonl(files.metrics_file)
    spent = len(config.experts) * config.problems * len(config.tasks)
    problems: list[int] = []
    qd: list[float | None] = []
    hits, misses = rest["memo"]
    last = config.grows_at[-1] if config.subsets else 1
    for generation in rows:
        spent += generation["problems"]
        problems.append(spent)
        qd.append(sum(generation["qd_score"]) if generation["generation"] >= last else None)
    return Outcome(problems, qd, rest["test"], rest["error"], rest["seconds"], (hits, misses))


def table(outcomes: Mapping[str, Mapping[int, Outcome]], horizon: int) -> list[Row]:
    """A row an arm: the median over the seeds of the problems to full evaluation's QD score.

    That is the score after ``horizon`` generations. The rest is of the whole runs.
    """
    full = outcomes["full"]
    rows: list[Row] = []
    for arm, runs in outcomes.items():
        if arm == "full":
            continue
        seeds = sorted(runs)
        targets = {seed: full[seed].qd[horizon - 1] or 0.0 for seed in seeds}
        needed = {seed: full[seed].reach(targets[seed]) or 0 for seed in seeds}
        reached = {seed: runs[seed].reach(targets[seed]) for seed in seeds}
        ratios = [needed[s] / at for s in seeds if (at := reached[s]) is not None]
        near = {seed: _NEAR * targets[seed] for seed in seeds}
        nearly = [
            round((full[s].reach(near[s]) or 0) / at, 3) if (at := runs[s].reach(near[s])) else None
            for s in seeds
        ]
        gains = [runs[seed].test - full[seed].test for seed in seeds]
        spent = [runs[seed].problems[-1] / full[seed].problems[-1] for seed in seeds]
        ends = [(runs[seed].qd[-1] or 0.0) / (full[seed].qd[-1] or 1.0) for seed in seeds]
        # Seeds that never came so far count as the worst.
        every = sorted([*ratios, *([0.0] * (len(seeds) - len(ratios)))])
        median = statistics.median(every)
        found = row(
            f"problems to full evaluation's QD score, {horizon} generations: {arm}",
            statistics.median(needed.values()) / median if median else float("inf"),
            statistics.median(needed.values()),
            "full evaluation",
            "problems",
            ratios=[round(ratio, 3) for ratio in ratios],
            ratios_nearly=nearly,
            reached=f"{len(ratios)} of {len(seeds)}",
            share_of_problems=_spread(spent),
            final_qd=_spread(ends),
            test=_spread([runs[seed].test for seed in seeds]),
            test_full=_spread([full[seed].test for seed in seeds]),
            test_gain=_spread(gains),
            seconds=_spread([runs[seed].seconds / full[seed].seconds for seed in seeds]),
        )
        rows.append(found)
        print(
            f"{arm}: QD score reached in {found['reached']} seeds, ratios {found['ratios']}, "
            f"median {median:.2f}, to {_NEAR:.0%} of it {nearly}; "
            f"share of problems {found['share_of_problems']}, "
            f"final QD score {found['final_qd']}, gain on test {found['test_gain']}"
        )
    return rows


def memoised(runs: Sequence[Outcome]) -> Row:
    """Programs that full evaluation judged and those that it ran, medians over the seeds."""
    judged, ran = [sum(run.memo) for run in runs], [run.memo[1] for run in runs]
    ratios = [a / b for a, b in zip(judged, ran, strict=True)]
    print(
        f"memoised results: {statistics.median(ran):.0f} of {statistics.median(judged):.0f} "
        f"programs ran, {_spread(ratios)} times fewer, {len(runs)} seeds"
    )
    return row(
        "programs that full evaluation runs: memoised",
        statistics.median(ran),
        statistics.median(judged),
        "every program",
        "programs",
        ratios=[round(ratio, 1) for ratio in ratios],
    )


def _spread(values: Sequence[float]) -> str:
    """Mean and standard error."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
