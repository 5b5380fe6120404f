"""Compiled programs kept on disk, so that a later start of the same run compiles nothing."""

from pathlib import Path

import jax


def cache_compilations(folder: Path) -> None:
    """Keep what XLA compiles in ``folder/xla``; a folder that cannot be written only costs time."""
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
