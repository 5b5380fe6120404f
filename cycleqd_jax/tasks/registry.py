"""Tasks by name, for command lines and configs."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from cycleqd_jax.tasks.base import Task
from cycleqd_jax.tasks.coding import CodingTask
from cycleqd_jax.tasks.database import DatabaseTask
from cycleqd_jax.tasks.dbbench.task import dbbench_from_environment
from cycleqd_jax.tasks.osbench.task import osbench_from_environment
from cycleqd_jax.tasks.programs.task import programs_from_environment
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
        "mbpp": partial(programs_from_environment, "mbpp"),
        "mbpp/sanitized": partial(programs_from_environment, "mbpp/sanitized"),
        "mbpp+": partial(programs_from_environment, "mbpp+"),
        "mbpp+/paper": partial(programs_from_environment, "mbpp+", "paper"),
        "humaneval": partial(programs_from_environment, "humaneval"),
        "humaneval+": partial(programs_from_environment, "humaneval+"),
        "osbench": osbench_from_environment,
        "osbench/offline": partial(osbench_from_environment, "offline"),
        "osbench/paper": partial(osbench_from_environment, "paper"),
    }
)


def make_task(name: str) -> Task:
    """Make the task of a name; one of the user's own is named as for `make_tasks`.

    Raises:
        ValueError: the name is unknown, or a benchmark's files are missing.
    """
    _check_known([name])
    return _make(name)


def make_tasks(names: Sequence[str]) -> list[Task]:
    """Make the tasks of these names, in this order.

    A task of the user's own is named ``MODULE:CLASS``; the module may lie in the current folder.

    Raises:
        ValueError: a name is unknown or repeated, there are fewer than two, or a benchmark's files
            are missing.
    """
    _check_known(names)
    if len(set(names)) != len(names):
        raise ValueError(f"expected each task once, found {', '.join(names)}")
    if len(names) < 2:
        raise ValueError(
            f"expected at least two tasks (one archive each), found {len(names)}: "
            "quality-diversity needs another task to be diverse in"
        )
    tasks = [_make(name) for name in names]
    if len({task.name for task in tasks}) != len(tasks):
        raise ValueError(
            "expected tasks of different names, found "
            + ", ".join(f"{task.name!r} ({name})" for name, task in zip(names, tasks, strict=True))
        )
    return tasks


def _check_known(names: Sequence[str]) -> None:
    known = {**TASKS, **BENCHMARKS}
    unknown = [name for name in names if name not in known and ":" not in name]
    if unknown:
        raise ValueError(
            f"expected task names among {', '.join(known)}, found {', '.join(map(repr, unknown))} "
            "(a task of your own is MODULE:CLASS)"
        )


def _make(name: str) -> Task:
    known = {**TASKS, **BENCHMARKS}
    return known[name]() if name in known else _import_task(name)


def _import_task(path: str) -> Task:
    module, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: no file here takes the place of an installed package
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"task {path!r}: expected MODULE:CLASS, importable from {os.getcwd()}: {error}"
        ) from error
    task = make()
    if not isinstance(task, Task):
        raise ValueError(
            f"task {path!r}: expected something with a name, problems() and episode(), "
            f"found {type(task).__name__}"
        )
    return task
