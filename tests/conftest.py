"""Every test runs with shape-checked kernels: jaxtyping annotations are verified by beartype.

Only in the rooms that have such annotations: elsewhere the type checker has seen all there is, and
checking every call of a generator of problems took most of its tests' time.
"""

import os
import subprocess
import sys
from collections.abc import Callable
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
