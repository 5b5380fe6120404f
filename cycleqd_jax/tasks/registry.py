"""Tasks by name, for command lines and configs."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from cycleqd_jax.tasks.base import Task
from cycleqd_jax.tasks.coding import CodingTask
from cycleqd_jax.tasks.database import DatabaseTask
from cycleqd_jax.tasks.dbbench.task import dbbench_from_environment
from cycleqd_jax.tasks.osbench.task import osbench_from_environment
from cycleqd_jax.tasks.shell import ShellTask

# Tasks that make their own problems.
TASKS: Mapping[str, Callable[[], Task]] = MappingProxyType(
    {"coding": CodingTask, "database": DatabaseTask, "shell": ShellTask}
)

# Public benchmarks, from files of the user's (`$CYCLEQD_DATA`).
BENCHMARKS: Mapping[str, Callable[[], Task]] = MappingProxyType(
    {
        "dbbench": dbbench_from_environment,
        "dbbench/loadable": partial(dbbench_from_environment, "loadable"),
        "dbbench/paper": partial(dbbench_from_environment, "paper"),
        "osbench": osbench_from_environment,
        "osbench/offline": partial(osbench_from_environment, "offline"),
        "osbench/paper": partial(osbench_from_environment, "paper"),
    }
)


def make_tasks(names: Sequence[str]) -> list[Task]:
    """Make the tasks of these names, in this order.

    Raises:
        ValueError: a name is unknown or repeated, there are fewer than two, or a benchmark's files
            are missing.
    """
    known = {**TASKS, **BENCHMARKS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"expected task names among {', '.join(known)}, found {', '.join(map(repr, unknown))}"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"expected each task once, found {', '.join(names)}")
    if len(names) < 2:
        raise ValueError(
            f"expected at least two tasks (one archive each), found {len(names)}: "
            "quality-diversity needs another task to be diverse in"
        )
    return [known[name]() for name in names]
