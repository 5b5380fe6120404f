"""What the scripts under ``experiments/`` share: arguments and plain error messages."""

import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from cycleqd_jax.runs.failures import GenerationFailed
from cycleqd_jax.runs.hosts.processes import HostsError
from cycleqd_jax.sandbox.base import SandboxBroken, SandboxUnavailable

# What a user can mend; anything else is a bug and keeps its traceback.
_MENDABLE = (ValueError, OSError, SandboxUnavailable, SandboxBroken, GenerationFailed, HostsError)


@contextmanager
def main_guard() -> Iterator[None]:
    """Turn the errors a user can mend into one message and exit code 2, without a traceback."""
    try:
        yield
    except (*_MENDABLE, KeyboardInterrupt) as error:
        sys.exit(show_error(error))


def show_error(error: BaseException, who: str = "") -> int:
    """Show what ends a program, and return its exit code.

    Args:
        error: what was raised; a bug is shown with its traceback.
        who: which of several processes shows it.
    """
    console, who = Console(stderr=True), who and f"{who}: "
    if isinstance(error, KeyboardInterrupt):
        console.print(f"{who}interrupted: start the same command again to go on")
        return 130
    if isinstance(error, _MENDABLE):
        console.print(f"[bold red]error:[/] {escape(f'{who}{error}')}", soft_wrap=True)
        return 2
    text = "".join(traceback.format_exception(error))
    console.print(f"{who}{text}", soft_wrap=True, markup=False, highlight=False)
    return 1


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
