"""Public benchmarks of programs: the reference solutions judged in the sandbox, and how fast.

    python benchmarks/programs.py --data DIR [--tasks mbpp mbpp+ …] [--workers N] [--json FILE]

DIR holds the files of `cycleqd_jax.tasks.programs.records.FILES`. What a reference solution answers
is found (or read from the cache) before the clock starts; MBPP+ is judged twice, by its base tests
and with all of EvalPlus's inputs. The bar for speed is 400 programs in 60 s.
"""

import argparse
import os
import time
from pathlib import Path

from measuring import Row, row, write_rows

from cycleqd_jax.cache import default_cache
from cycleqd_jax.sandbox import Sandbox, open_sandbox
from cycleqd_jax.tasks.programs.judging import LIMITS, judge_all
from cycleqd_jax.tasks.programs.records import Name
from cycleqd_jax.tasks.programs.task import ProgramTask, open_programs

NAMES: tuple[Name, ...] = ("mbpp", "mbpp/sanitized", "mbpp+", "humaneval")
RATE_BAR = 400 / 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=[*NAMES, "humaneval+"], default=NAMES)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    rows: list[Row] = []
    with open_sandbox(limits=LIMITS, workers=options.workers) as sandbox:
        for name in options.tasks:
            started = time.perf_counter()
            task = open_programs(name, options.data, cache=options.cache, sandbox=sandbox)
            print(f"{name}: opened in {time.perf_counter() - started:.1f} s")
            rows += measure(task, sandbox, base_only=True)
            if any(len(suites) > 1 for suites in task.suites):
                rows += measure(task, sandbox, base_only=False)
    write_rows(options.json, rows)


def measure(task: ProgramTask, sandbox: Sandbox, *, base_only: bool) -> list[Row]:
    """Share of the reference solutions that pass, and programs judged per second."""
    problems = task.every_problem()
    judged = [(problem.record, problem.suites) for problem in problems]
    answers = [problem.answers[0] for problem in problems]
    started = time.perf_counter()
    verdicts = judge_all(judged, answers, sandbox, base_only=base_only)
    seconds = time.perf_counter() - started
    failed = [
        problem.record.id
        for problem, verdict in zip(problems, verdicts, strict=True)
        if not (verdict.base if base_only else verdict.plus)
    ]
    kind = "base" if base_only else "base and plus"
    passed, rate = len(problems) - len(failed), len(problems) / seconds
    print(
        f"{task.name}, {kind}: {passed} of {len(problems)} reference solutions pass, "
        f"{seconds:.1f} s, {rate:.1f} programs/s; not passed: {', '.join(failed) or 'none'}"
    )
    title = f"{task.name}, {kind}"
    return [
        row(f"{title}: references that pass", passed, len(problems), "bar", "programs",
            more_is_better=True),
        row(f"{title}: judged", rate, RATE_BAR, "bar", "programs/s", more_is_better=True),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
