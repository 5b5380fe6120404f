"""Tasks by name, for command lines and configs."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from cycleqd_jax.tasks.base import Task
from cycleqd_jax.tasks.coding import CodingTask
from cycleqd_jax.tasks.database import DatabaseTask
from cycleqd_jax.tasks.shell import ShellTask

TASKS: Mapping[str, Callable[[], Task]] = MappingProxyType(
    {"coding": CodingTask, "database": DatabaseTask, "shell": ShellTask}
)


def make_tasks(names: Sequence[str]) -> list[Task]:
    """Make the tasks of these names, in this order.

    Raises:
        ValueError: a name is unknown or repeated, or there are fewer than two.
    """
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ValueError(
            f"expected task names among {', '.join(TASKS)}, found {', '.join(map(repr, unknown))}"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"expected each task once, found {', '.join(names)}")
    if len(names) < 2:
        raise ValueError(
            f"expected at least two tasks (one archive each), found {len(names)}: "
            "quality-diversity needs another task to be diverse in"
        )
    return [TASKS[name]() for name in names]
