"""Programs that a model wrote are run here, by the thousand, behind a wall."""

from .base import Job, Limits, Outcome, Sandbox, SandboxBroken, SandboxUnavailable
from .memo import MemoSandbox
from .pool import open_sandbox

__all__ = [
    "Job",
    "Limits",
    "MemoSandbox",
    "Outcome",
    "Sandbox",
    "SandboxBroken",
    "SandboxUnavailable",
    "open_sandbox",
]
