"""What the scripts under ``experiments/`` share: arguments and plain error messages."""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from cycleqd_jax.runs.failures import GenerationFailed
from cycleqd_jax.sandbox.base import SandboxBroken, SandboxUnavailable


@contextmanager
def main_guard() -> Iterator[None]:
    """Turn the errors a user can mend into one message and exit code 2, without a traceback."""
    try:
        yield
    except (
        ValueError,
        OSError,
        SandboxUnavailable,
        SandboxBroken,
        GenerationFailed,
    ) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted: start the same command again to go on")
        sys.exit(130)


def parse_experts(arguments: Sequence[str], option: str = "--experts") -> dict[str, str]:
    """Read ``NAME=DIR`` arguments of an option.

    Raises:
        ValueError: one has no name or folder, or a name comes twice.
    """
    experts: dict[str, str] = {}
    for argument in arguments:
        name, sign, folder = argument.partition("=")
        if not (name and sign and folder):
            raise ValueError(f"{option}: expected NAME=DIR, found {argument!r}")
        if name in experts:
            raise ValueError(f"{option}: the name {name!r} was given twice")
        experts[name] = folder
    return experts


def reproduce_command() -> str:
    """Return the command line this process was started with, but for passwords in URLs."""
    return re.sub(r"(\w://[^:/@\s]*):[^/@\s]*@", r"\1:***@", shlex.join(["python", *sys.argv]))
