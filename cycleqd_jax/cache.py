"""Where the library keeps what it can make again."""

import os
from pathlib import Path


def default_cache() -> Path:
    """``$CYCLEQD_CACHE``, or ``~/.cache/cycleqd_jax``."""
    chosen = os.environ.get("CYCLEQD_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cycleqd_jax"
