"""The sandbox that users open: a few workers and the jobs spread over them."""

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

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

    Jobs of all threads and of all calls share the workers, first come, first served.
    """

    def __init__(self, backend: str, limits: Limits, workers: int) -> None:
        self.backend = backend
        self.limits = limits
        self._workers: list[Worker] = []
        self._dispatcher: _Dispatcher | None = None
        layout = machine_layout()
        command = COMMANDS[backend](layout)
        if command is None:
            raise SandboxUnavailable("not installed")
        config = {"layout": inner_layout(backend, layout), "limits": _plain(limits)}
        try:
            for _ in range(workers):
                self._workers.append(Worker(command, clean_environment(layout), config))
            self._dispatcher = _Dispatcher(self._workers, limits)
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
        ValueError for a job that does not fit `Limits.file_mb`; nothing is run then.
        """
        futures = self._post([self._pack(job) for job in jobs])
        try:
            return [future.result() for future in futures]
        finally:
            # Where one has failed, or the wait was interrupted, nobody waits for the others.
            for future in futures:
                future.cancel()

    def submit(self, jobs: Sequence[Job]) -> list[Future[Outcome]]:
        """Start `jobs` and return at once; see `submit` in `sandbox.base`.

        Errors are those of `run`, each the future's own. Raises ValueError for a closed sandbox.
        """
        posted = []
        for job in jobs:
            try:
                posted.append(self._pack(job))
            except ValueError as error:
                unfit = _Posted(False, b"", Future())
                unfit.future.set_exception(error)
                posted.append(unfit)
        return self._post(posted)

    def _post(self, posted: "Sequence[_Posted]") -> list[Future[Outcome]]:
        dispatcher = self._dispatcher  # another thread may close the sandbox meanwhile
        if dispatcher is None:
            raise ValueError("this sandbox is closed; open another one")
        dispatcher.post([one for one in posted if not one.future.done()])
        return [one.future for one in posted]

    def _pack(self, job: Job) -> "_Posted":
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
        body = wire.pack_body(job.kind == "python", job.source, job.files, job.stdin)
        return _Posted(job.snapshot, body, Future())

    def close(self) -> None:
        """End all workers; what they have not run is an error. Safe to repeat."""
        if self._dispatcher is not None:
            self._dispatcher.close()
            self._dispatcher = None
        for worker in self._workers:
            worker.close()
        self._workers = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Posted(NamedTuple):
    """A job on its way to a worker, and who waits for it."""

    snapshot: bool
    body: bytes
    future: Future[Outcome]


class _Dispatcher:
    """Deals jobs to the workers from a thread of its own, where their futures are settled too."""

    def __init__(self, workers: Sequence[Worker], limits: Limits) -> None:
        self._workers = list(workers)
        self._limits = limits
        self._lock = threading.Lock()  # of the next two, which other threads write
        self._arrived: list[_Posted] = []
        self._closed = False
        self._numbers = 0
        self._jobs: dict[int, _Posted] = {}
        self._waiting: deque[int] = deque()
        self._failures: dict[int, int] = {}
        self._under_way: dict[Worker, list[int]] = {worker: [] for worker in self._workers}
        self._heard = dict.fromkeys(self._workers, time.monotonic())
        self._awake, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # A daemon: a sandbox that nobody closes must not keep the process alive.
        self._thread = threading.Thread(target=self._serve, name="sandbox", daemon=True)
        self._thread.start()

    def post(self, jobs: Sequence[_Posted]) -> None:
        """Hand jobs over; any thread may."""
        with self._lock:
            if self._closed:
                raise ValueError("this sandbox is closed; open another one")
            self._arrived += jobs
            self._call()

    def close(self) -> None:
        """End the thread; every job that has no outcome fails."""
        with self._lock:
            self._closed = True
            self._call()
        self._thread.join()
        os.close(self._awake)
        os.close(self._wake)

    def _call(self) -> None:
        # A full pipe wakes the thread as well.
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b"x")

    def _serve(self) -> None:
        while self._take_over():
            try:
                for worker in self._workers:
                    self._guard(worker, self._feed)
                self._exchange()
                self._restart_silent()
            except Exception as error:
                # Those who wait hear of it, whatever it is; the next jobs may fare better.
                self._give_up(error)
        self._give_up(ValueError("this sandbox was closed while programs were waiting"))

    def _take_over(self) -> bool:
        """Number the new jobs; whether there will be others."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
            closed = self._closed
        for posted in arrived:
            # Numbers are never used twice: an answer that comes too late finds nobody.
            self._jobs[self._numbers] = posted
            self._waiting.append(self._numbers)
            self._numbers = (self._numbers + 1) % (1 << 32)
        return not closed

    def _give_up(self, error: Exception) -> None:
        # What is still under way would be answered to nobody.
        for worker, numbers in self._under_way.items():
            if numbers:
                worker.stop()
                numbers.clear()
        jobs, self._jobs = self._jobs, {}
        self._waiting.clear()
        self._failures.clear()
        for posted in jobs.values():
            if posted.future.running() or posted.future.set_running_or_notify_cancel():
                posted.future.set_exception(error)

    def _settle(self, number: int, outcome: Outcome) -> None:
        self._failures.pop(number, None)
        self._jobs.pop(number).future.set_result(outcome)

    def _drop_cancelled(self) -> None:
        """Take jobs from the head of the queue that nobody waits for."""
        while self._waiting:
            future = self._jobs[self._waiting[0]].future
            if future.running() or future.set_running_or_notify_cancel():
                return
            del self._jobs[self._waiting.popleft()]

    def _feed(self, worker: Worker) -> None:
        numbers = self._under_way[worker]
        while len(numbers) < _WINDOW:
            self._drop_cancelled()
            # After a failure a job runs alone, so that nobody else is blamed for the next one.
            if not self._waiting or (
                numbers and not self._failures.keys().isdisjoint([*numbers, self._waiting[0]])
            ):
                break
            if not worker.alive:
                worker.start()
            if not numbers:
                self._heard[worker] = time.monotonic()
            number = self._waiting.popleft()
            numbers.append(number)
            worker.send(wire.pack_job(number, self._jobs[number].snapshot, self._jobs[number].body))

    def _exchange(self) -> None:
        poller = select.poll()
        poller.register(self._awake, select.POLLIN)
        by_fd: dict[int, Worker] = {}
        for worker in self._workers:
            if worker.alive and self._under_way[worker]:
                by_fd[worker.reading] = by_fd[worker.writing] = worker
                poller.register(worker.reading, select.POLLIN)
                if worker.waiting_to_write:
                    poller.register(worker.writing, select.POLLOUT)
        # Without jobs only a new one, or the end, is waited for.
        ready = [fd for fd, _ in poller.poll(1000 if self._jobs else None)]
        if self._awake in ready:
            os.read(self._awake, 1 << 16)
        for worker in dict.fromkeys(by_fd[fd] for fd in ready if fd in by_fd):
            self._guard(worker, self._talk)

    def _talk(self, worker: Worker) -> None:
        worker.flush()
        for message in worker.receive():
            # A worker runs one program at a time: since the last answer, or since it was idle.
            now = time.monotonic()
            seconds, self._heard[worker] = now - self._heard[worker], now
            number = message.pop("id")
            self._under_way[worker].remove(number)
            if "error" in message:
                self._refused(number, message["error"])
            else:
                self._settle(number, Outcome(**message, seconds=seconds))

    def _guard(self, worker: Worker, action: Callable[[Worker], None]) -> None:
        try:
            action(worker)
        except OSError as error:
            self._lost(worker, f"the sandbox server died ({error}) {worker.complaint()}")
        except SandboxUnavailable as error:
            raise SandboxBroken(f"the sandbox server does not start again: {error}") from error

    def _lost(self, worker: Worker, why: str) -> None:
        worker.stop()
        numbers, self._under_way[worker] = self._under_way[worker], []
        for number in reversed(numbers):
            if self._failed(number) > 1 and len(numbers) == 1:
                self._settle(number, Outcome("killed", -9, "", "", None, f"twice, {why}"))
            else:
                self._waiting.appendleft(number)

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
