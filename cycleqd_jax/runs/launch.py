"""From a command to a run: look before anything long, then run, or print the plan and stop."""

import os

from rich.console import Console

from cycleqd_jax.runs import compilation
from cycleqd_jax.runs.command import Command
from cycleqd_jax.runs.console import reproduce_command
from cycleqd_jax.runs.preflight import Preflight, findings_table, plan_text


def launch(command: Command, *, train_seconds: float = 0.0, console: Console | None = None) -> None:
    """Check what the run needs, then run it; a dry run prints both and stops before.

    Args:
        command: what to run.
        train_seconds: what making the experts took, for the summary.
        console: where tables go; by default the terminal's.

    Raises:
        NotReady: checks failed, all of them named.
        ValueError, SandboxUnavailable, KeyboardInterrupt: as of `evolve`.
    """
    console = console or Console()
    _say_where(command)
    if not command.dry_run:
        compilation.cache_compilations(command.cache)
        if (command.out / "summary.json").exists():  # needs nothing any more
            _evolve(command, None, train_seconds, console)
            return
    preflight = Preflight(command)
    findings = preflight.run()
    if command.dry_run:
        console.print(findings_table(findings))
        console.print(
            plan_text(command, preflight.needs), soft_wrap=True, highlight=False, markup=False
        )
    preflight.refuse()
    if not command.dry_run:
        _evolve(command, preflight.mesh, train_seconds, console)


def _say_where(command: Command) -> None:
    """Tell the tasks where their files and their server are, as the environment would."""
    for name, value in (("CYCLEQD_DATA", command.data), ("CYCLEQD_DB", command.db)):
        if value is not None:
            os.environ[name] = str(value)


def _evolve(
    command: Command, mesh: tuple[int, int] | None, train_seconds: float, console: Console
) -> None:
    from cycleqd_jax.runs.driver import evolve  # here: a dry run loads no Orbax

    evolve(
        command.run,
        command.out,
        mesh=mesh,
        train_seconds=train_seconds,
        transcripts=command.transcripts,
        watch=command.watch,
        command=reproduce_command(),
        cache=command.cache,
        console=console,
    )
