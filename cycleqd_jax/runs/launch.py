"""From a command to a run: look before anything long, then run, or print the plan and stop."""

import os

from rich.console import Console

from cycleqd_jax.runs import compilation
from cycleqd_jax.runs.command import Command
from cycleqd_jax.runs.console import reproduce_command
from cycleqd_jax.runs.hosts.joining import joined_hosts
from cycleqd_jax.runs.hosts.processes import Hosts
from cycleqd_jax.runs.preflight import Preflight, findings_table, plan_text


def launch(command: Command, *, train_seconds: float = 0.0, console: Console | None = None) -> None:
    """Check what the run needs, then run it; a dry run prints both and stops before.

    Where the run has several processes an error ends them all here, see `joined_hosts`.

    Args:
        command: what to run.
        train_seconds: what making the experts took, for the summary.
        console: where tables go; by default the terminal's.

    Raises:
        NotReady: checks failed, all of them named.
        ValueError, SandboxUnavailable, KeyboardInterrupt: as of `evolve`.
    """
    _say_where(command)
    with joined_hosts(command.coordinator, command.process, command.processes) as hosts:
        console = (console or Console()) if hosts.first else Console(quiet=True)
        if not command.dry_run:
            compilation.cache_compilations(command.cache)
            # A finished run needs nothing any more.
            if hosts.broadcast(hosts.first and (command.out / "summary.json").exists()):
                _evolve(command, None, train_seconds, console, hosts)
                return
        preflight = Preflight(command, hosts)
        findings = preflight.run()
        if command.dry_run:
            console.print(findings_table(findings))
            console.print(
                plan_text(command, preflight.needs), soft_wrap=True, highlight=False, markup=False
            )
        preflight.refuse()
        if not command.dry_run:
            _evolve(command, preflight.mesh, train_seconds, console, hosts)


def _say_where(command: Command) -> None:
    """Tell the tasks where their files and their server are, as the environment would."""
    for name, value in (("CYCLEQD_DATA", command.data), ("CYCLEQD_DB", command.db)):
        if value is not None:
            os.environ[name] = str(value)


def _evolve(
    command: Command,
    mesh: tuple[int, int] | None,
    train_seconds: float,
    console: Console,
    hosts: Hosts,
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
        hosts=hosts,
    )
