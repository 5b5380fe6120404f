"""Every test runs with shape-checked kernels: jaxtyping annotations are verified by beartype.

Only in the rooms that have such annotations: elsewhere the type checker has seen all there is, and
checking every call of a generator of problems took most of its tests' time.
"""

import gc
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# More than half of the time of the tests would be the compiler optimising what runs once. CI also
# runs all of them as users do, with `XLA_FLAGS=` set to nothing. Said before JAX is imported; XLA
# does not start with a flag it does not know, hence the version.
_FAST_COMPILATION = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    _FAST_COMPILATION += [
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
os.environ.setdefault("XLA_FLAGS", " ".join(_FAST_COMPILATION))
_COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "xla"

install_import_hook(
    [f"cycleqd_jax.{room}" for room in ("merging", "models", "qd", "training")], "beartype.beartype"
)


def pytest_configure() -> None:
    """Keep what is compiled, for the other worker and for the next run: most of it is the same."""
    import jax  # after the flags are said

    # Not by the environment: processes that tests start and kill are to find nothing half written.
    jax.config.update("jax_compilation_cache_dir", str(_COMPILED))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture
def on_eight_devices() -> Callable[[str], str]:
    """``on_eight_devices(source)``: what a program prints that finds eight devices of a CPU."""

    def run(source: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", source],
            env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture
def nothing_left() -> Callable[..., AbstractContextManager[None]]:
    """``nothing_left(seconds=0)``: it leaves no descriptor, mount or name of this computer behind.

    ``seconds`` is how long what is over may take to go. What was open before may go meanwhile; what
    is new may not stay in its place.
    """
    return _nothing_left


@contextmanager
def _nothing_left(seconds: float = 0.0) -> Iterator[None]:
    gc.collect()
    before, rest = _descriptors(), (_mounts(), os.uname())
    yield
    deadline = time.monotonic() + seconds
    gc.collect()
    while (new := _descriptors() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert new == Counter()
    while (now := (_mounts(), os.uname())) != rest and time.monotonic() < deadline:
        time.sleep(0.02)
    assert now == rest


def _descriptors() -> Counter[str]:
    """What is open, and how often: a file's path, a socket's or pipe's number."""
    found: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        try:
            found[os.readlink(f"/proc/self/fd/{number}")] += 1
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


def _mounts() -> list[str]:
    """Without the small file systems of other tests (`small_disk`), which come and go."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if not ("/pytest-of-" in line and "/disk rw" in line)]
