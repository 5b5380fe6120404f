"""The sandbox that users open: a few workers and the jobs spread over them."""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from .base import Job, Limits, Outcome, SandboxBroken, SandboxUnavailable
from .inside import wire
from .launch import COMMANDS, inner_layout
from .layout import clean_environment, machine_layout
from .worker import Worker

# A second job waits in the pipe, so that a worker never waits for the parent.
_WINDOW = 2
_PATIENCE_SECONDS = 10.0
_MAX_FILES, _MAX_SOURCE = 2000, 1 << 22
# Namespaces of ended programs are cleared away a moment later: a refusal may not last.
_TRIES = 5
_ADVICE = (
    "Programs written by a model are never run without a sandbox. Install bubblewrap "
    "(`apt install bubblewrap`, `dnf install bubblewrap`) or util-linux, on Linux, and let "
    "ordinary users make user namespaces: `sysctl kernel.unprivileged_userns_clone=1 "
    "user.max_user_namespaces=10000`, on Ubuntu 24.04 and later also "
    "`sysctl kernel.apparmor_restrict_unprivileged_userns=0`; a container needs `--privileged` "
    "(or `--security-opt seccomp=unconfined --security-opt systempaths=unconfined`)."
)


def open_sandbox(
    backend: str = "auto", limits: Limits | None = None, workers: int | None = None
) -> "Pool":
    """A sandbox that has proved itself on one Python and one bash program.

    backend: "auto" takes bubblewrap when it works, else util-linux's unshare.
    limits: of every program. workers: programs that run at the same time, by default one for
        each processor this process may use.

    Raises SandboxUnavailable with what was tried and what to install, ValueError for an unknown
    backend.
    """
    if backend != "auto" and backend not in COMMANDS:
        known = ", ".join(["auto", *COMMANDS])
        raise ValueError(f"sandbox backend: expected one of {known}, found {backend!r}")
    if workers is not None and workers < 1:
        raise ValueError(f"sandbox workers: expected at least 1, found {workers}")
    tried = []
    for name in COMMANDS if backend == "auto" else [backend]:
        try:
            return Pool(name, limits or Limits(), workers or len(os.sched_getaffinity(0)))
        except SandboxUnavailable as error:
            tried.append(f"{name}: {error}")
    raise SandboxUnavailable(f"No sandbox works here. Tried: {'; '.join(tried)}. {_ADVICE}")


class Pool:
    """Workers of one backend; made by `open_sandbox`.

    One thread at a time runs jobs, others wait for it.
    """

    def __init__(self, backend: str, limits: Limits, workers: int) -> None:
        self.backend = backend
        self.limits = limits
        self._lock = threading.Lock()
        self._numbers = 0
        self._workers: list[Worker] = []
        layout = machine_layout()
        command = COMMANDS[backend](layout)
        if command is None:
            raise SandboxUnavailable("not installed")
        config = {"layout": inner_layout(backend, layout), "limits": _plain(limits)}
        try:
            for _ in range(workers):
                self._workers.append(Worker(command, clean_environment(layout), config))
            self._prove()
        except BaseException:
            self.close()
            raise

    def _prove(self) -> None:
        try:
            outcomes = self.run([Job("python", "print(6 * 7)"), Job("bash", "echo $((6 * 7))")])
        except SandboxBroken as error:
            raise SandboxUnavailable(str(error)) from error
        for kind, outcome in zip(("Python", "bash"), outcomes, strict=True):
            if outcome.stdout != "42\n":
                raise SandboxUnavailable(f"a {kind} program that prints 42 gave {outcome}")

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Outcomes of `jobs` in their order.

        A server that dies is started again and so are its programs, each alone; one with which it
        dies again is "killed". Raises SandboxBroken when programs can no longer be started,
        ValueError for a job that does not fit `Limits.file_mb`.
        """
        for job in jobs:
            self._check(job)
        with self._lock:
            if not self._workers:
                raise ValueError("this sandbox is closed; open another one")
            return _Batch(self._workers, self.limits, self._pack(jobs)).run()

    def _pack(self, jobs: Sequence[Job]) -> dict[int, bytes]:
        # Numbers are never used twice: an answer that comes too late finds nobody.
        packed = {}
        for job in jobs:
            body = wire.pack_body(job.kind == "python", job.source, job.files, job.stdin)
            packed[self._numbers] = wire.pack_job(self._numbers, job.snapshot, body)
            self._numbers = (self._numbers + 1) % (1 << 32)
        return packed

    def _check(self, job: Job) -> None:
        # Every file takes whole pages of the private directory.
        texts = [*job.files.values(), job.stdin]
        size = sum(-(-len(text.encode(errors="replace")) // 4096) * 4096 for text in texts)
        if size > self.limits.file_mb << 20:
            raise ValueError(
                f"Job.files and Job.stdin: {size / 2**20:.1f} MiB in all, Limits.file_mb allows "
                f"{self.limits.file_mb}; make the files smaller or the limit larger"
            )
        for name, found, most in (
            ("files", len(job.files), _MAX_FILES),
            ("source", len(job.source), _MAX_SOURCE),
        ):
            if found > most:
                raise ValueError(f"Job.{name}: expected a length of at most {most}, found {found}")

    def close(self) -> None:
        """End all workers; safe to repeat."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Batch:
    """The state of one call of run: what waits, what is under way, what is done."""

    def __init__(self, workers: list[Worker], limits: Limits, packed: dict[int, bytes]) -> None:
        self._workers = workers
        self._limits = limits
        self._packed = packed
        self._waiting = deque(packed)
        self._done: dict[int, Outcome] = {}
        self._failures: dict[int, int] = {}
        self._under_way: dict[Worker, list[int]] = {worker: [] for worker in workers}
        self._heard = dict.fromkeys(workers, time.monotonic())

    def run(self) -> list[Outcome]:
        """All outcomes, in the order of the jobs."""
        try:
            while len(self._done) < len(self._packed):
                for worker in self._workers:
                    self._guard(worker, self._feed)
                self._exchange()
                self._restart_silent()
        except BaseException:
            # What is still under way would be answered into the next batch.
            for worker, numbers in self._under_way.items():
                if numbers:
                    worker.stop()
            raise
        return [self._done[number] for number in self._packed]

    def _feed(self, worker: Worker) -> None:
        if not worker.alive:
            worker.start()
        numbers = self._under_way[worker]
        while self._waiting and len(numbers) < _WINDOW:
            # After a failure a job runs alone, so that nobody else is blamed for the next one.
            if numbers and not self._failures.keys().isdisjoint([*numbers, self._waiting[0]]):
                break
            if not numbers:
                self._heard[worker] = time.monotonic()
            numbers.append(self._waiting.popleft())
            worker.send(self._packed[numbers[-1]])

    def _exchange(self) -> None:
        poller = select.poll()
        by_fd: dict[int, Worker] = {}
        for worker in self._workers:
            if worker.alive and self._under_way[worker]:
                by_fd[worker.reading] = by_fd[worker.writing] = worker
                poller.register(worker.reading, select.POLLIN)
                if worker.waiting_to_write:
                    poller.register(worker.writing, select.POLLOUT)
        for worker in dict.fromkeys(by_fd[fd] for fd, _ in poller.poll(1000)):
            self._guard(worker, self._talk)

    def _talk(self, worker: Worker) -> None:
        worker.flush()
        for message in worker.receive():
            self._heard[worker] = time.monotonic()
            number = message.pop("id")
            self._under_way[worker].remove(number)
            if "error" in message:
                self._refused(number, message["error"])
            else:
                self._done[number] = Outcome(**message)

    def _guard(self, worker: Worker, action: Callable[[Worker], None]) -> None:
        try:
            action(worker)
        except OSError as error:
            self._lost(worker, f"the sandbox server died ({error}) {worker.complaint()}")
        except SandboxUnavailable as error:
            raise SandboxBroken(f"the sandbox server does not start again: {error}") from error

    def _lost(self, worker: Worker, why: str) -> None:
        worker.stop()
        numbers = self._under_way[worker]
        for number in reversed(numbers):
            if self._failed(number) > 1 and len(numbers) == 1:
                self._done[number] = Outcome("killed", -9, "", "", None, f"twice, {why}")
            else:
                self._waiting.appendleft(number)
        self._under_way[worker] = []

    def _refused(self, number: int, why: str) -> None:
        if self._failed(number) >= _TRIES:
            raise SandboxBroken(f"a program could not be started, {_TRIES} times: {why}")
        time.sleep(0.05)
        self._waiting.append(number)

    def _failed(self, number: int) -> int:
        self._failures[number] = self._failures.get(number, 0) + 1
        return self._failures[number]

    def _restart_silent(self) -> None:
        latest = time.monotonic() - self._limits.seconds - _PATIENCE_SECONDS
        for worker in self._workers:
            if self._under_way[worker] and self._heard[worker] < latest:
                worker.kill()
                self._lost(worker, "the sandbox server did not answer")


def _plain(limits: Limits) -> dict[str, float | int]:
    return {
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_mb << 20,
        "processes": limits.processes,
        "file_bytes": limits.file_mb << 20,
        "output_bytes": limits.output_kb << 10,
        "snapshot_bytes": limits.snapshot_kb << 10,
    }
