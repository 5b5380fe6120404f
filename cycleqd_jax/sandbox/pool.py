"""Workers behind the wall and the parent's side of the conversation with them."""

import json
import os
import selectors
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, Self

from .base import Job, Limits, Outcome, Sandbox, SandboxBroken, SandboxUnavailable
from .launch import COMMANDS, inner_layout
from .layout import Layout, clean_environment, machine_layout

Backend = Literal["auto", "bubblewrap", "unshare"]


def open_sandbox(
    backend: Backend = "auto", limits: Limits | None = None, workers: int | None = None
) -> Sandbox:
    """A sandbox that has already run one program."""
    limits = limits or Limits()
    names = list(COMMANDS) if backend == "auto" else [backend]
    tried = []
    for name in names:
        try:
            pool = Pool(name, limits, workers or os.cpu_count() or 1)
        except SandboxUnavailable as error:
            tried.append(f"{name}: {error}")
            continue
        return pool
    raise SandboxUnavailable("; ".join(tried))


class Pool:
    def __init__(self, backend, limits, workers):
        layout = machine_layout()
        command = COMMANDS[backend](layout)
        if command is None:
            raise SandboxUnavailable("not installed")
        config = {
            "layout": inner_layout(backend, layout),
            "limits": {
                "seconds": limits.seconds,
                "memory_bytes": limits.memory_mb << 20,
                "processes": limits.processes,
                "file_bytes": limits.file_mb << 20,
                "output_bytes": limits.output_kb << 10,
                "snapshot_bytes": limits.snapshot_kb << 10,
            },
        }
        self.procs = []
        for _ in range(workers):
            err = tempfile.TemporaryFile()
            p = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, env=clean_environment(layout), start_new_session=True, bufsize=0)
            self.procs.append(p)
            send(p, config)
            r = recv(p)
            if not r or "ready" not in r:
                err.seek(0)
                raise SandboxUnavailable(f"{r} {err.read().decode()}")

    def run(self, jobs):
        out = [None] * len(jobs)
        todo = deque(enumerate(jobs))
        lock = threading.Lock()
        def work(p):
            infl = 0
            while True:
                while infl < 2:
                    with lock:
                        if not todo:
                            break
                        i, job = todo.popleft()
                    send(p, {"id": i, "snapshot": job.snapshot})
                    send(p, {"kind": job.kind, "source": job.source, "files": dict(job.files), "stdin": job.stdin})
                    infl += 1
                if not infl:
                    return
                r = recv(p)
                infl -= 1
                if "error" in r:
                    raise SandboxBroken(r["error"])
                i = r.pop("id"); out[i] = Outcome(**r)
        ts = [threading.Thread(target=work, args=(p,)) for p in self.procs]
        [t.start() for t in ts]
        [t.join() for t in ts]
        return out

    def close(self):
        for p in self.procs:
            p.stdin.close(); p.stdout.close()
            p.wait()
    def __enter__(self): return self
    def __exit__(self, *a): self.close()

def send(p, m):
    b = json.dumps(m).encode()
    p.stdin.write(len(b).to_bytes(4, "big") + b)

def recv(p):
    from .inside.jail import read_frame
    return read_frame(p.stdout.fileno())
