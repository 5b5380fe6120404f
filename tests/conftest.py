"""Every test runs with shape-checked kernels: jaxtyping annotations are verified by beartype."""

import os
from importlib.metadata import version

from jaxtyping import install_import_hook

# More than half of the time of the tests would be the compiler optimising what runs once. CI also
# runs all of them as users do, with `XLA_FLAGS=` set to nothing. Said before JAX is imported; XLA
# does not start with a flag it does not know, hence the version.
_FAST_COMPILATION = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    _FAST_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FAST_COMPILATION))

install_import_hook("cycleqd_jax", "beartype.beartype")
