"""Every test runs with shape-checked kernels: jaxtyping annotations are verified by beartype."""

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
    _FAST_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FAST_COMPILATION))

install_import_hook("cycleqd_jax", "beartype.beartype")


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
