"""OS interaction: the reference solutions on private machines, and many machines at once.

    python benchmarks/osbench.py --data DIR [--json FILE]

DIR holds AgentBench v0.2's data/os_interaction. An agent that knows the reference solutions plays
every problem that can be solved without a network, 32 episodes at a time; then 32 machines are
started together, and the scripts of 32 episodes run while all of them are alive.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measuring import Row, row, write_rows

from cycleqd_jax.sandbox import Sandbox, open_sandbox
from cycleqd_jax.sandbox.machines import Machines
from cycleqd_jax.tasks.osbench.offline import not_offline
from cycleqd_jax.tasks.osbench.task import OSBenchProblem, OSBenchTask, open_osbench
from cycleqd_jax.tasks.policies import ideal_policy
from cycleqd_jax.tasks.rollout import rollout

AT_ONCE = 32
MINUTE = 60.0  # no time was asked for; something has to stand beside ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    started = time.perf_counter()
    task = open_osbench(options.data)
    opened = time.perf_counter() - started
    problems = task.every_problem()
    reasons = not_offline(task.backend.users)
    offline = [problem for problem in problems if problem.record.id not in reasons]
    others = [problem for problem in problems if problem.record.id in reasons]
    with open_sandbox(workers=1) as sandbox:
        scores, seconds = ideal_scores(task, offline, sandbox)
        failed = [p.record.id for p, s in zip(offline, scores, strict=True) if s != 1.0]
        print(
            f"common system in {opened:.2f} s; reference solutions: {sum(scores):.0f} of "
            f"{len(offline)} in {seconds:.1f} s, not solved: {', '.join(failed) or 'none'}"
        )
        for problem, score in zip(others, ideal_scores(task, others, sandbox)[0], strict=True):
            reason = reasons[problem.record.id]
            print(f"  left out: {problem.record.id:15} scores {score:.0f}: {reason}")
    assert isinstance(task.backend, Machines)
    boot, alive = many(task.backend)
    print(f"{AT_ONCE} machines start together in {boot:.2f} s, then type in {alive:.2f} s")
    rows: list[Row] = [
        bar("reference solutions that score 1", sum(scores) / len(offline), 1.0, "share", True),
        bar("all offline problems, 32 at a time", seconds, MINUTE, "s", False),
        bar("32 machines start together", boot, MINUTE, "s", False),
        bar("32 machines, a command each", alive, MINUTE, "s", False),
    ]
    task.backend.close()
    write_rows(options.json, rows)


def bar(title: str, ours: float, limit: float, unit: str, more_is_better: bool) -> Row:
    name = "a minute" if unit == "s" else "bar"
    return row(f"OS: {title}", ours, limit, name, unit, more_is_better=more_is_better)


def ideal_scores(
    task: OSBenchTask, problems: Sequence[OSBenchProblem], sandbox: Sandbox
) -> tuple[list[float], float]:
    """Scores of the agent that knows the reference solutions, and the seconds of all together."""

    def score(problem: OSBenchProblem) -> float:
        alone = {task.name: [problem]}
        return float(rollout([task], alone, 1, ideal_policy([problem]), sandbox).scores[0, 0])

    return timed_map(score, problems)


def many(machines: Machines) -> tuple[float, float]:
    """Seconds to start many machines, and to have a command run in each."""
    started, boot = timed_map(lambda _: machines.boot(), range(AT_ONCE))
    turns, alive = timed_map(lambda machine: machine.type("touch /x; ls /x", 60.0), started)
    for machine in started:
        machine.close()
    assert [turn.output for turn in turns] == ["/x\n"] * AT_ONCE
    return boot, alive


def timed_map(function: Callable, items: Sequence) -> tuple[list, float]:
    begun = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        results = list(threads.map(function, items))
    return results, time.perf_counter() - begun


if __name__ == "__main__":
    main()
