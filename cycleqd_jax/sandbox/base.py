"""What every sandbox takes and gives: jobs, limits, outcomes."""

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Literal, Protocol, runtime_checkable

Status = Literal["ok", "error", "timeout", "killed"]


class SandboxUnavailable(RuntimeError):  # noqa: N818 (a state of the machine, not a bug)
    """No safe way to run a program on this machine; the message says what to install."""


class SandboxBroken(RuntimeError):  # noqa: N818
    """A sandbox that had started can no longer run programs (no memory, no namespaces left)."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    seconds: wall-clock time; also CPU time of each process, rounded up to a whole second.
    memory_mb: address space of each process (beyond the bare interpreter's), and resident memory
        of all its processes together with what their sockets can hold (looked at every 20 ms).
    processes: processes and threads alive at once, the program itself included.
    file_mb: its whole private directory and /tmp, with the job's own files and stdin; hence also
        the largest file.
    output_kb: stdout and stderr each; a program that writes more is killed.
    snapshot_kb: text that a snapshot returns; more makes the outcome "killed".

    Raises ValueError for a limit that is not positive.
    """

    seconds: float | int = 2.0
    memory_mb: int = 256
    processes: int = 16
    file_mb: int = 16
    output_kb: int = 64
    snapshot_kb: int = 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"Limits.{name}: expected a positive number, found {value!r}")


@dataclass(frozen=True)
class Job:
    """One program and the files it finds in its working directory.

    kind: "python" runs `source` as `__main__` with the standard library, "bash" as a script.
    files: relative path -> text; a path that ends in "/" makes an empty directory.
    stdin: text on its standard input.
    snapshot: return the working directory after the run in `Outcome.files`.

    Raises ValueError for an unknown kind or a path that is not inside the working directory.
    """

    kind: str
    source: str
    files: Mapping[str, str] = field(default_factory=dict)
    stdin: str = ""
    snapshot: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("python", "bash"):
            raise ValueError(f'Job.kind: expected "python" or "bash", found {self.kind!r}')
        _check_files(tuple(self.files))


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    status: "ok" (exit code 0), "error" (another exit code), "timeout", "killed" (a limit or a
        signal; `reason` says which).
    returncode: exit code, or minus the signal's number.
    stdout, stderr: at most `Limits.output_kb` each, undecodable bytes replaced.
    files: None without `Job.snapshot`; else relative path -> text of every regular file
        (undecodable bytes replaced), and "path/" -> "" for every directory. Symbolic links,
        pipes and sockets are left out and never followed.
    seconds: how long it ran, as far as the sandbox says so; it does not tell outcomes apart.
    """

    status: Status
    returncode: int
    stdout: str
    stderr: str
    files: dict[str, str] | None = None
    reason: str = ""
    seconds: float = field(default=0.0, compare=False)


@runtime_checkable
class Sandbox(Protocol):
    """Runs programs that nobody trusts."""

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Outcomes of `jobs` in their order."""
        ...

    def close(self) -> None:
        """Ends the processes behind the sandbox; it cannot be used afterwards."""
        ...

    def __enter__(self) -> "Sandbox": ...

    def __exit__(self, *exc: object) -> None: ...


@runtime_checkable
class Submitting(Protocol):
    """A sandbox that can be given jobs while it runs others."""

    def submit(self, jobs: Sequence[Job]) -> list[Future[Outcome]]:
        """Start `jobs` and return at once."""
        ...


def submit(sandbox: Sandbox, jobs: Sequence[Job]) -> list[Future[Outcome]]:
    """Start `jobs`; every future is done, in whatever thread, when its own program has ended.

    A sandbox that cannot do this runs them in a thread, as one batch that ends together. What `run`
    would raise is the error of the futures it concerns. A future that is cancelled before its
    program has started takes it from the queue.
    """
    if isinstance(sandbox, Submitting):
        return sandbox.submit(jobs)
    futures: list[Future[Outcome]] = [Future() for _ in jobs]
    for future in futures:
        future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            settled = list(zip(futures, sandbox.run(jobs), strict=True))
        except Exception as error:
            for future in futures:
                future.set_exception(error)
            return
        for future, outcome in settled:
            future.set_result(outcome)

    if jobs:
        threading.Thread(target=run, name="sandbox-batch", daemon=True).start()
    return futures


@lru_cache(maxsize=4096)
def _check_files(paths: tuple[str, ...]) -> None:
    """Kept: every candidate meets the same trees."""
    for path in paths:
        _check_path(path)
    _check_tree(paths)


def _check_path(path: str) -> None:
    parts = PurePosixPath(path).parts
    wrong = (
        "is empty"
        if not parts
        else "is absolute"
        if path.startswith("/")
        else "leads outside"
        if ".." in parts
        else "has a NUL character"
        if "\0" in path
        else "is too long"
        if len(path.encode(errors="replace")) > 1000
        or any(len(part.encode(errors="replace")) > 255 for part in parts)
        else ""
    )
    if wrong:
        raise ValueError(
            f"Job.files: {path!r} {wrong}; expected a path inside the program's directory, "
            'such as "notes/a.txt" (or "notes/" for an empty directory)'
        )


def _check_tree(files: Iterable[str]) -> None:
    paths = {PurePosixPath(path) for path in files if not path.endswith("/")}
    folders = {PurePosixPath(path) for path in files if path.endswith("/")}
    for path in paths | folders:
        folders.update(path.parents)
    if both := sorted(map(str, paths & folders)):
        raise ValueError(f"Job.files: {both[0]!r} is a file and a directory; rename one of them")
