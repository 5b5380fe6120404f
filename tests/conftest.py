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
# What was compiled is kept, for the other worker and for the next run: most of it is the same.
_COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

install_import_hook(
    [f"cycleqd_jax.{room}" for room in ("merging", "models", "qd", "training")], "beartype.beartype"
)


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
