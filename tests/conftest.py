"""Every test runs with shape-checked kernels: jaxtyping annotations are verified by beartype."""

import os

from jaxtyping import install_import_hook

# Half of the time of the tests is LLVM optimising programs that run once. CI also runs all of them
# as users do, with `XLA_FLAGS=` set to nothing; it has to be said before JAX is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

install_import_hook("cycleqd_jax", "beartype.beartype")
