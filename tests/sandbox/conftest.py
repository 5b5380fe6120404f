"""Sandboxes of every backend that this machine has."""

import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from cycleqd_jax import sandbox
from cycleqd_jax.sandbox import Limits, open_sandbox

PROGRAM = {"bubblewrap": "bwrap", "unshare": "unshare"}
# Where a program that had got out could write.
OUTSIDE = ["/", "/etc", "/etc/passwd", "/home", "/usr", "/usr/bin", "/usr/lib", "/usr/local/bin"]
# Generous where a test waits for success, tight where it waits for a limit.
ROOMY = Limits(seconds=20.0, memory_mb=256, processes=16, file_mb=8, output_kb=64)
# Where the clock is what ends most programs.
HASTY = Limits(seconds=0.6, memory_mb=128, processes=12, file_mb=4, output_kb=64)
TIGHT = Limits(seconds=2.0, memory_mb=128, processes=12, file_mb=4, output_kb=64)


# A plain `pytest` tries the backend that a run would use here, CI every one.
_FIRST = "bubblewrap" if shutil.which("bwrap") else "unshare"


@pytest.fixture(
    scope="session",
    params=[
        name if name == _FIRST else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(PROGRAM)
    ],
)
def backend(request):
    if shutil.which(PROGRAM[request.param]) is None:
        pytest.skip(f"{PROGRAM[request.param]} is not installed")
    return request.param


@pytest.fixture(scope="session")
def roomy(backend):
    with open_sandbox(backend, ROOMY, workers=2) as opened:
        yield opened


@pytest.fixture(scope="session")
def tight(backend):
    with open_sandbox(backend, TIGHT, workers=3) as opened:
        yield opened


@pytest.fixture(scope="session")
def hasty(backend):
    with open_sandbox(backend, HASTY, workers=6) as opened:
        yield opened


@pytest.fixture(scope="session")
def single(backend):
    with open_sandbox(backend, ROOMY, workers=1) as opened:
        yield opened


@pytest.fixture
def untouched(nothing_left):
    """A context at whose end this process and its machine are as they were at its start."""

    @contextmanager
    def both():
        with nothing_left(seconds=5), _untouched():
            yield

    return both


@pytest.fixture
def public_copy():
    """A folder with the room's code, from where every user may import it."""
    with tempfile.TemporaryDirectory() as name:
        package = Path(name, "cycleqd_jax")
        shutil.copytree(Path(sandbox.__file__).parent, package / "sandbox")
        (package / "__init__.py").touch()
        for path in (Path(name), *Path(name).rglob("*")):
            path.chmod(0o755)
        yield name


@contextmanager
def _untouched():
    before, memory = _traces(), _resident_bytes()
    yield
    # The kernel takes the last process of a namespace away a moment after the first.
    deadline = time.monotonic() + 5
    while (after := _traces()) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert after == before
    assert _resident_bytes() < memory + (32 << 20)


def _traces():
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    return {
        "processes": {pid for pid in parents if _is_below(pid, os.getpid(), parents)},
        "outside": {place: os.stat(place).st_mtime_ns for place in OUTSIDE},
        "environment": dict(os.environ),
        "directory": os.getcwd(),
    }


def _is_below(pid, top, parents):
    while pid not in (0, top):
        pid = parents.get(pid, 0)
    return pid == top


def _resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
