"""Every test runs with shape-checked kernels: jaxtyping annotations are verified by beartype."""

from jaxtyping import install_import_hook

install_import_hook("cycleqd_jax", "beartype.beartype")
