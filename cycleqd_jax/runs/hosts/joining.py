"""From single processes to the hosts of one run, and how they part again."""

import contextlib
import os
import socket
import sys
import threading
import warnings
from collections.abc import Iterator

import jax
import rich
from rich.console import Console
from rich.markup import escape

from cycleqd_jax.runs.console import show_error
from cycleqd_jax.runs.hosts.lifeline import Doors, Lifeline, knock, linger_on_abort, own_address
from cycleqd_jax.runs.hosts.processes import (
    ALONE,
    Hosts,
    HostsError,
    JoinedHosts,
    Stopped,
    exchange,
)

# JAX's own watch only stands behind the lifeline, which is quicker and says who is lost.
_HEARTBEAT_SECONDS = 45
_START_SECONDS = 300


@contextlib.contextmanager
def joined_hosts(
    coordinator: str | None = None, process: int | None = None, processes: int | None = None
) -> Iterator[Hosts]:
    """Join the processes of a run while the block lasts; before anything is computed.

    Without arguments those of a cluster that JAX recognises are joined (SLURM, Open MPI,
    Kubernetes, TPU pods), and on any other machine there is this process alone.

    With several processes an error of one does not leave the block: it is shown, the others are
    told and end as well, and so does this process, with the exit code of `show_error`. What is
    raised in all, `Stopped`, leaves it in process 0; the others end with the exit code 130.

    Args:
        coordinator: ``host:port`` of process 0, where it listens; any free port.
        process: number of this process.
        processes: how many there are.

    Raises:
        ValueError: only some of the arguments, or numbers that make no sense.
        HostsError: the others did not come.
    """
    chosen = _chosen(coordinator, process, processes)
    if chosen is None and not in_cluster():
        yield ALONE
        return
    _initialize(chosen)
    if jax.process_count() == 1:
        yield ALONE
        return
    index, count = jax.process_index(), jax.process_count()
    name = f"process {index} of {count}"

    def say(why: str) -> None:
        console = Console(stderr=True)
        console.show_cursor()  # a progress bar may have hidden it
        console.print(f"[bold red]error:[/] {escape(f'{name}: {why}')}", soft_wrap=True)

    lifeline = Lifeline(index, count, _links(index, count, chosen), say)
    linger_on_abort()
    if index:
        rich.get_console().quiet = True
    stopped: Stopped | None = None
    try:
        hosts = JoinedHosts(lifeline)
        try:
            yield hosts
        except Stopped as error:  # raised in all of them: nobody is left behind
            stopped = error
        hosts.gather(None, "the end")
    except BaseException as error:
        code = show_error(error, name if index else "")
        interrupted = isinstance(error, KeyboardInterrupt)
        lifeline.leave("it was interrupted" if interrupted else f"{error}")
        sys.stdout.flush()
        sys.stderr.flush()
        # Not the usual way: JAX would wait for the others, which are ending like this too.
        os._exit(code)
    lifeline.close()
    jax.distributed.shutdown()
    if stopped is not None:
        if index:  # process 0 says it
            sys.exit(130)
        raise stopped


def in_cluster() -> bool:
    """Whether JAX recognises a cluster in which this is one process of several.

    Raises:
        RuntimeError: Kubernetes does not say how many there are.
    """
    from jax._src.clusters import ClusterEnv

    for kind in ClusterEnv._cluster_types:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a package is missing for clusters
            if kind.opt_in_only_method or not kind.is_env_present():
                continue
            try:
                return kind.get_process_count() > 1
            except RuntimeError:
                if "JOB_COMPLETION_INDEX" in os.environ:  # one of several pods of a job
                    raise
    return False


def _chosen(
    coordinator: str | None, process: int | None, processes: int | None
) -> tuple[str, int, int] | None:
    """What the command line says of the processes."""
    given = {"--coordinator": coordinator, "--process": process, "--processes": processes}
    missing = [flag for flag, value in given.items() if value is None]
    if coordinator is None or process is None or processes is None:
        if len(missing) < len(given):
            raise ValueError(
                f"several processes: expected {', '.join(given)} together, found no "
                f"{' and no '.join(missing)}"
            )
        return None
    host, sign, port = coordinator.rpartition(":")
    if not (host and sign and port.isdecimal()):
        raise ValueError(f"--coordinator: expected HOST:PORT of process 0, found {coordinator!r}")
    if not 0 <= process < processes:
        raise ValueError(
            f"--process: expected a number from 0 to {processes - 1} with --processes "
            f"{processes}, found {process}"
        )
    return coordinator, process, processes


def _initialize(chosen: tuple[str, int, int] | None) -> None:
    """Start JAX's service, or find it.

    Raises:
        HostsError: the port is taken, or JAX cannot join the processes.
    """
    # It would take SIGTERM for itself; a run stops by an agreement of its own.
    jax.config.update("jax_enable_preemption_service", False)
    address, index, count = chosen or (None, None, None)
    where = f" at {address}" if address else ""
    if address is not None and index == 0:
        _check_port(int(address.rpartition(":")[2]))
    late = threading.Timer(_START_SECONDS, _give_up, (where,))
    late.daemon = True
    late.start()
    Console(stderr=True).print(f"joining the processes of the run{where}", highlight=False)
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            cluster_detection_method="deactivate" if chosen else None,
            initialization_timeout=2 * _START_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except RuntimeError as error:
        raise HostsError(f"the processes cannot be joined{where}: {error}") from error
    finally:
        late.cancel()


def _give_up(where: str) -> None:
    """JAX would end the process with a stack trace, and only later."""
    error = HostsError(
        f"the processes were not joined{where} within {_START_SECONDS / 60:g} minutes: start every "
        "process from 0 on, once each, and let them reach process 0 there"
    )
    os._exit(show_error(error))


def _check_port(port: int) -> None:
    """JAX falls silently where another program has it."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise HostsError(
            f"--coordinator: cannot listen at port {port} ({why}): choose another"
        ) from error


def _links(index: int, count: int, chosen: tuple[str, int, int] | None) -> dict[int, socket.socket]:
    """Connections for the lifeline."""
    host = chosen[0].rpartition(":")[0].strip("[]") if chosen else own_address()
    doors = Doors(host) if index == 0 else None
    (address, *_) = exchange(None if doors is None else doors.address)
    return {0: knock(address, index)} if doors is None else doors.admit(count)
