"""OS interaction: the reference solutions on private machines, and many machines at once.

    python benchmarks/osbench.py --data DIR [--json FILE]

DIR holds AgentBench v0.2's data/os_interaction. An agent that knows the reference solutions plays
every problem that can be solved without a network, 32 episodes at a time; then 32 machines are
started together, and the scripts of 32 episodes run while all of them are alive.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measuring import Row, row, write_rows

from cycleqd_jax.sandbox.machines import Machines
from cycleqd_jax.tasks.base import Ask, Call
from cycleqd_jax.tasks.osbench import prompt
from cycleqd_jax.tasks.osbench.offline import NOT_OFFLINE
from cycleqd_jax.tasks.osbench.records import Record
from cycleqd_jax.tasks.osbench.task import OSBenchProblem, OSBenchTask, open_osbench

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
    offline = [problem for problem in problems if problem.record.id not in NOT_OFFLINE]
    scores, seconds = timed_map(lambda problem: play(task, problem), offline)
    failed = [p.record.id for p, s in zip(offline, scores, strict=True) if s != 1.0]
    print(
        f"common system in {opened:.2f} s; reference solutions: {sum(scores):.0f} of "
        f"{len(offline)} in {seconds:.1f} s, not solved: {', '.join(failed) or 'none'}"
    )
    others = [problem for problem in problems if problem.record.id in NOT_OFFLINE]
    for problem, score in zip(others, timed_map(lambda p: play(task, p), others)[0], strict=True):
        reason = NOT_OFFLINE[problem.record.id]
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


def play(task: OSBenchTask, problem: OSBenchProblem) -> float:
    """The score of the agent that knows the reference solution."""
    episode = task.episode(problem)
    try:
        step = next(episode)
        while True:
            if isinstance(step, Ask):
                heard = step.messages[-1].content
                step = episode.send(speak(problem.record, len(step.messages), heard))
            else:
                assert isinstance(step, Call)
                step = episode.send(step.function())
    except StopIteration as end:
        return float(end.value)


def speak(record: Record, length: int, heard: str) -> str:
    """First the reference solution, then its last line as the answer, or the label."""
    first = length == len(prompt.opening(""))
    if record.example and first:
        return prompt.write_bash(record.example.code)
    if record.match is not None:
        return prompt.write_commit(record.match)
    lines = heard.splitlines()
    return prompt.write_commit(lines[-1] if len(lines) > 1 else None)


def many(machines: Machines) -> tuple[float, float]:
    """Seconds to start many machines, and to have a command run in each."""
    started, boot = timed_map(lambda _: machines.boot(), range(AT_ONCE))
    turns, alive = timed_map(lambda machine: machine.type("touch /x; ls /x", 60.0), started)
    for machine in started:
        machine.close()
    assert [turn.output for turn in turns] == ["/x\n"] * AT_ONCE
    return boot, alive


def timed_map(function: Callable, items: list | range) -> tuple[list, float]:
    begun = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        results = list(threads.map(function, items))
    return results, time.perf_counter() - begun


if __name__ == "__main__":
    main()
