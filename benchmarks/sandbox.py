"""Programs per second of the sandbox, against a new process for every program.

    python benchmarks/sandbox.py [--backend auto] [--workers N] [--programs 1000] [--json FILE]

The peers are what one would write without a fork server: `subprocess.run` of a fresh Python
(without any sandbox) and of `bwrap … bash` with a fresh directory and a walk over it. They get
as many threads as we have workers. The limit is the rate of bare fork, exit and wait of a small
process, and of fork, exec of bash, exit and wait, on all processors.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from measuring import row, write_rows

from cycleqd_jax.sandbox import Job, Limits, open_sandbox

FUNCTION = """def squares(values):
    total = 0
    for value in values:
        if value > 0:
            total += value * value
    return total
assert squares([1, 2, 3]) == 14
assert squares([]) == 0
assert squares([-1, 4]) == 16
"""
TREE = {f"logs/{name}.txt": "nothing here\n" * 20 for name in "abcd"} | {"notes.txt": "x\ny\nxx\n"}
COMMAND = "grep -c x notes.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    peers = max(options.programs // 5, 10)

    rows = []
    with open_sandbox(options.backend, Limits(seconds=20.0), options.workers) as sandbox:
        print(f"backend {sandbox.backend}, {options.workers} workers")
        for title, job, peer, peer_name, limit in (
            ("sandbox python", Job("python", FUNCTION), plain_python, "subprocess python", []),
            (
                "sandbox bash",
                Job("bash", COMMAND, files=TREE, snapshot=True),
                bwrap_bash,
                "subprocess bwrap bash",
                ["bash", "--noprofile", "--norc", "-c", ":"],
            ),
        ):
            ours = most_of(3, partial(our_rate, sandbox, job, options.programs))
            theirs = most_of(2, partial(threaded_rate, peer, peers, options.workers))
            bare = most_of(2, partial(bare_rate, limit, peers, options.workers))
            rows.append(
                row(title, ours, theirs, peer_name, "programs/s", bare, more_is_better=True)
            )
    for measured in rows:
        print(
            f"{measured['row']:16s} {measured['ours']:8.0f}/s   {measured['peer_name']} "
            f"{measured['peer']:.0f}/s   ratio {measured['ratio']:.1f}   "
            f"bare processes {measured['limit']:.0f}/s"
        )
    write_rows(options.json, rows)


def most_of(times: int, measure: Callable[[], float]) -> float:
    return max(measure() for _ in range(times))


def our_rate(sandbox: Any, job: Job, programs: int) -> float:
    start = time.perf_counter()
    outcomes = sandbox.run([job] * programs)
    seconds = time.perf_counter() - start
    wrong = [outcome for outcome in outcomes if outcome.status != "ok"]
    if wrong:
        raise SystemExit(f"{len(wrong)} programs failed, the first with {wrong[0]}")
    return programs / seconds


def threaded_rate(run: Callable[[int], None], programs: int, threads: int) -> float:
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(run, range(programs)))
        return programs / (time.perf_counter() - start)


def plain_python(_: int) -> None:
    subprocess.run([sys.executable, "-I", "-S", "-c", FUNCTION], check=True, capture_output=True)


def bwrap_bash(_: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path, text in TREE.items():
            target = Path(folder, path)
            target.parent.mkdir(exist_ok=True)
            target.write_text(text)
        command = ["bwrap", "--unshare-all", "--clearenv", "--setenv", "PATH", "/usr/bin:/bin"]
        for name in ("usr", "bin", "lib", "lib64"):
            if Path("/", name).exists():
                command += ["--ro-bind", f"/{name}", f"/{name}"]
        command += ["--proc", "/proc", "--dev", "/dev", "--bind", folder, "/work"]
        command += ["--chdir", "/work", "bash", "-c", COMMAND]
        subprocess.run(command, check=True, capture_output=True)
        {p: p.read_text() for p in Path(folder).rglob("*") if p.is_file()}


def bare_rate(command: list[str], programs: int, processes: int) -> float:
    """Processes started and waited for per second, by small parents side by side."""
    code = (
        "import os, sys, time\ncommand = sys.argv[2:]\nstart = time.perf_counter()\n"
        "for _ in range(int(sys.argv[1])):\n"
        "    if command: pid = os.posix_spawnp(command[0], command, {'LC_ALL': 'C.UTF-8'})\n"
        "    else:\n        pid = os.fork()\n        if pid == 0: os._exit(0)\n"
        "    os.waitpid(pid, 0)\nprint(time.perf_counter() - start)"
    )
    arguments = [sys.executable, "-I", "-S", "-c", code, str(programs), *command]
    parents = [subprocess.Popen(arguments, stdout=subprocess.PIPE) for _ in range(processes)]
    return sum(programs / float(parent.communicate()[0]) for parent in parents)


if __name__ == "__main__":
    main()
