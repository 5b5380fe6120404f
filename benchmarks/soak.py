"""What thousands of programs, harmless and hostile, leave behind in both sandboxes.

    python benchmarks/soak.py [--programs 10000] [--workers N] [--round 250] [--json FILE]

Every round mixes Python and bash, one program in twelve of them hostile: it bombs memory, disk,
processes or output, hides its memory, never ends, leaves daemons behind or spoils what it can for
the next program. After each round the script counts the processes, descriptors and mounts of this
process and of the workers, the temporary files, and their memory. At the end it says what has
grown, prints a table, and exits with 1 if anything was left behind or any harmless program was
judged wrong.
"""

import argparse
import collections
import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from measuring import Row, row, write_rows

from cycleqd_jax.sandbox import Job, Limits, Outcome, open_sandbox

LIMITS = Limits(seconds=1.0, memory_mb=128, processes=12, file_mb=4, output_kb=64)
BACKENDS = ("bubblewrap", "unshare")
HOSTILE_SHARE = 12
# Bytes by which the memory of a process that forgets everything may still differ: the allocator's.
_SLACK = 8 << 20

HARMLESS = (
    (Job("python", "print(sum(x * x for x in range(1000)))"), "332833500\n"),
    (Job("python", "import json, re\nprint(json.dumps(re.findall('a.', 'abac')))"),
     '["ab", "ac"]\n'),
    (Job("python", "print(input()[::-1])", stdin="abc\n"), "cba\n"),
    (Job("python", "from pathlib import Path\nprint(Path('a/b').read_text())",
         files={"a/b": "text"}, snapshot=True), "text\n"),
    (Job("bash", "echo $((6 * 7))"), "42\n"),
    (Job("bash", "grep -c x notes", files={"notes": "x\ny\nx\n"}), "2\n"),
    (Job("bash", "mkdir d; echo 1 > d/f; cat d/f", snapshot=True), "1\n"),
    (Job("bash", "seq 9 | sort -r | head -n 1"), "9\n"),
)  # fmt: skip

_ANY = "ok error timeout killed"
HOSTILE = (
    ("python", "import os\nwhile True: os.fork()", "error timeout killed"),
    ("bash", "f() { f | f; }; f; exit 1", "error timeout killed"),
    ("bash", "for i in {1..30}; do sleep 9 & done 2> /dev/null; exit 1", "error timeout killed"),
    ("python", "import threading, time\nwhile True:\n"
     "    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()", "error timeout"),
    ("python", "x = []\nwhile True: x.append(bytearray(1 << 20))", "error killed"),
    ("python", "import os, time\nfor _ in range(7):\n    if os.fork() == 0: break\n"
     "x = b'x' * (60 << 20)\ntime.sleep(9)", "killed timeout"),
    ("python", "import mmap\nk = []\nwhile True: k.append(mmap.mmap(-1, 1 << 24))", "error"),
    ("python", "import ctypes, mmap, os, threading, time\ndef hold():\n"
     "    x = mmap.mmap(-1, 90 << 20, 34)\n    for i in range(0, 90 << 20, 4096): x[i] = 1\n"
     "    time.sleep(9)\nfor _ in range(4):\n    if os.fork() == 0:\n"
     "        threading.Thread(target=hold).start(); time.sleep(0.01)\n"
     "        ctypes.CDLL(None).syscall(60 if os.uname().machine == 'x86_64' else 93, 0)\n"
     "time.sleep(9)", "killed timeout error"),
    ("python", "import socket, time\nk = []\ntry:\n  while True:\n"
     "    k.append(socket.socketpair())\n    k[-1][0].setblocking(False)\n    try:\n"
     "      while True: k[-1][0].send(bytes(8192))\n    except BlockingIOError: pass\n"
     "except OSError: time.sleep(9)", "killed timeout"),
    ("bash", "x=xxxxxxxxxxxxxxxx; while :; do x=$x$x; done", "error"),
    ("bash", "a=(x); while :; do a=(\"${a[@]}\" \"${a[@]}\"); done", "error killed timeout"),
    ("bash", "cat /dev/zero > f", "error"),
    ("bash", "yes > /tmp/f", "error"),
    ("python", "n = 0\nwhile True: open(str(n), 'w').close(); n += 1", "error timeout"),
    ("python", "import os\nwhile True: os.mkdir('d' * 50); os.chdir('d' * 50)",
     "error killed timeout"),
    ("bash", "yes", "killed"),
    ("python", "import os\nwhile True: os.write(2, b'x' * 65536)", "killed"),
    ("bash", "head -c 1G /dev/zero | tr '\\0' x", "killed"),
    ("python", "while True: pass", "timeout"),
    ("bash", "trap '' $(seq 1 64); sleep 60", "timeout"),
    ("python", "import os, time\nos.closerange(0, 256)\ntime.sleep(60)", "timeout"),
    ("bash", "exec <&- >&- 2>&-; sleep 60", "timeout"),
    ("python", "import atexit, time\natexit.register(time.sleep, 60)", "timeout"),
    ("python", "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
     "        os.closerange(0, 9)\n        time.sleep(60)\n    os._exit(0)\nos.wait()", "ok"),
    ("bash", "(setsid sleep 60 > /dev/null 2>&1 &); (sleep 60 > /dev/null 2>&1 &) ; exit 3",
     "error"),
    ("bash", "kill -9 -1; kill -9 0", _ANY),
    ("python", "import os, signal\nfor pid in (os.getppid(), -1): os.kill(pid, signal.SIGKILL)",
     _ANY),
    ("python", "import ctypes; ctypes.string_at(1)", "killed"),
    ("python", "import os; os.abort()", "killed"),
    ("python", "import socket; socket.create_connection(('1.1.1.1', 80), 1)", "error"),
    ("bash", "echo > /dev/tcp/1.1.1.1/80", "error"),
    ("python", "import builtins, fcntl, json, sys\nbuiltins.print = json.dumps = None\n"
     "sys.path.clear()\nfcntl.fcntl(0, fcntl.F_SETFL, 2048)\nopen('/proc/self/autogroup', 'w')",
     "error"),
    ("bash",
     "ln -s / up; ln -s up/etc/passwd p; mkfifo q; cat p; chmod 0 .; rm -rf /usr/bin 2> /dev/null",
     "error"),
    ("bash", "unshare -r true || mount -t tmpfs t /tmp || umount -l /proc", "error"),
    ("python", "import os\nos.execv('/bin/true', ['x' * 100000] * 1000)", "error"),
    ("python", "eval('(' * 30000)", "error"),
)  # fmt: skip


@dataclass(frozen=True)
class Traces:
    """What this process and its workers hold. Memory is in bytes, all else is counted."""

    processes: int
    descriptors: int
    workers_descriptors: int
    mounts: int
    temporary: int
    memory: int
    workers_memory: int

    def grown(self, before: "Traces") -> dict[str, int]:
        """What there is more of than before."""
        more = {name: value - vars(before)[name] for name, value in vars(self).items()}
        return {n: m for n, m in more.items() if m > (_SLACK if n.endswith("memory") else 0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--round", type=int, default=250)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.programs < len(BACKENDS) or options.round < 1:
        parser.error(
            f"expected at least {len(BACKENDS)} programs, one a sandbox, and rounds of at least 1, "
            f"found --programs {options.programs} --round {options.round}"
        )
    with tempfile.TemporaryDirectory() as folder:
        # A folder that nobody else on this machine writes to.
        tempfile.tempdir = folder
        rows = [soak(name, options.programs // len(BACKENDS), options) for name in BACKENDS]
    for found in rows:
        print(f"\n{found['row']}: {found['programs']} programs, {found['rate']:.0f}/s")
        print(f"  ended   {found['ended']}")
        for name, (first, last) in found["traces"].items():
            print(f"  {name:20s} {first:10.1f} -> {last:10.1f}")
        print(f"  judged wrong: {len(found['wrong'])}; left behind: {found['left'] or 'nothing'}")
        for line in found["wrong"][:5]:
            print(f"    {line}")
    write_rows(options.json, rows)
    sys.exit(any(found["ours"] for found in rows))


def soak(backend: str, programs: int, options: argparse.Namespace) -> Row:
    """One backend's row; what it counts is the things left behind and the wrong judgements."""
    outside = traces()
    ended: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    first = last = outside
    seconds, done = 0.0, 0
    with open_sandbox(backend, LIMITS, options.workers) as sandbox:
        for number, jobs in enumerate(rounds(programs, options.round)):
            start = time.perf_counter()
            outcomes = sandbox.run([job for job, _, _ in jobs])
            seconds += time.perf_counter() - start
            done += len(jobs)
            for (job, text, ends), outcome in zip(jobs, outcomes, strict=True):
                ended[outcome.status if text is None else "harmless"] += 1
                if outcome.status not in ends.split() or text not in (None, outcome.stdout):
                    wrong.append(complaint(job, outcome))
            del outcomes
            last = settled(first)
            # The first rounds fill what is then used again.
            first = last if number < 2 else first
            print(f"{backend}: {done} programs, {seconds:.0f} s, {last}", flush=True)
    left = {"in use": last.grown(first), "after close": settled(outside).grown(outside)}
    found = {when: what for when, what in left.items() if what}
    return row(
        f"soak {backend}",
        len(wrong) + sum(map(len, found.values())),
        0.0,
        "bar",
        "things left behind or judged wrong",
        0.0,
        programs=done,
        rate=done / seconds,
        ended=dict(ended),
        wrong=wrong,
        left=found,
        traces={
            name: [value / (2**20 if name.endswith("memory") else 1) for value in pair]
            for name, pair in ((n, (v, vars(last)[n])) for n, v in vars(first).items())
        },
    )


def rounds(programs: int, size: int) -> Iterator[list[tuple[Job, str | None, str]]]:
    """Batches of (job, expected output or None, statuses it may end with)."""
    hostile = 0
    for start in range(0, programs, size):
        jobs: list[tuple[Job, str | None, str]] = []
        for index in range(start, min(start + size, programs)):
            if index % HOSTILE_SHARE == 0:
                kind, source, ends = HOSTILE[hostile % len(HOSTILE)]
                jobs.append((Job(kind, source, snapshot=hostile % 2 == 0), None, ends))
                hostile += 1
            else:
                job, text = HARMLESS[index % len(HARMLESS)]
                jobs.append((job, text, "ok"))
        yield jobs


def settled(before: Traces) -> Traces:
    """Traces as soon as they are no more than before, at the latest after three seconds."""
    deadline = time.monotonic() + 3
    while (now := traces()).grown(before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return now


def traces() -> Traces:
    """Count what this process and all below it hold."""
    gc.collect()
    workers = below(os.getpid())
    mounts = [count_lines(pid, "mountinfo") for pid in (os.getpid(), *workers)]
    return Traces(
        processes=len(workers),
        descriptors=count_descriptors("self"),
        workers_descriptors=sum(map(count_descriptors, workers)),
        mounts=sum(mounts),
        temporary=len(os.listdir(tempfile.gettempdir())),
        memory=resident("self"),
        workers_memory=sum(map(resident, workers)),
    )


def below(top: int) -> list[int]:
    """All processes that descend from one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = set[int](), {top}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return sorted(found)


def resident(pid: int | str) -> int:
    """Bytes of memory that a process has in use; 0 when it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def count_descriptors(pid: int | str) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def count_lines(pid: int | str, name: str) -> int:
    try:
        return len(Path(f"/proc/{pid}/{name}").read_text().splitlines())
    except OSError:
        return 0


def complaint(job: Job, outcome: Outcome) -> str:
    seen: Sequence[object] = (outcome.status, outcome.reason, outcome.stdout[:80])
    return f"{job.source[:80]!r}: {seen} {outcome.stderr[-200:]}"


if __name__ == "__main__":
    main()
