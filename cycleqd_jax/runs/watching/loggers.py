"""Where metrics go besides ``metrics.jsonl``: TensorBoard event files, Weights & Biases.

Both packages are optional and imported when they are asked for. A resumed run goes on where its
last checkpoint is: what was logged after it is logged again, and replaces it.
"""

import importlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from cycleqd_jax.atomic import write_text_atomic
from cycleqd_jax.runs.watching.watch import LoggerName

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@runtime_checkable
class Logger(Protocol):
    """Takes the scalars of a generation."""

    def log(self, generation: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of one generation."""

    def close(self) -> None:
        """Write what is not written yet."""


class TensorBoardLogger:
    """Event files.

    Args:
        folder: of the event files; show it with ``tensorboard --logdir``.
        done: generations of an earlier start that stay; later ones are shown no more.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        module = _import("tensorboard")
        self._writer = module.SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def log(self, generation: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of one generation."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, generation)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandbLogger:
    """A Weights & Biases run in project ``cycleqd``; its usual variables (``WANDB_MODE``, …) hold.

    Args:
        folder: the run's; the package keeps its files below it.
        config: what the run was started with.

    A resumed run is the same run there: its id is kept in ``FOLDER/wandb-id``.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        module = _import("wandb")
        file = folder / "wandb-id"
        if not file.exists():
            write_text_atomic(file, uuid.uuid4().hex)
        self._run = module.init(
            project="cycleqd",
            dir=str(folder),
            id=file.read_text(encoding="utf-8"),
            resume="allow",
            config=dict(config),
        )
        # Steps of its own only grow: generations that are bred again would be dropped.
        self._run.define_metric("generation")
        self._run.define_metric("*", step_metric="generation")

    def log(self, generation: int, scalars: Mapping[str, float]) -> None:
        """Send the scalars of one generation."""
        self._run.log({"generation": generation, **scalars})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_loggers(
    names: Sequence[LoggerName], folder: Path, config: Mapping[str, Any], done: int
) -> Iterator[Logger]:
    """Open the loggers of a run, one after the other; each is to be closed.

    Args:
        names: which.
        folder: the run's.
        config: what the run was started with.
        done: generations of an earlier start.

    Raises:
        ValueError: a package is not installed; the message says how to install it.
    """
    check_loggers(names)
    for name in names:
        if name == "tensorboard":
            yield TensorBoardLogger(folder / "tensorboard", done)
        else:
            yield WandbLogger(folder, config)


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Import what the loggers need.

    Raises:
        ValueError: as of `open_loggers`, for the first package that is missing.
    """
    for name in names:
        _import(name)


def scalars_of(row: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, float]:
    """The numbers of a row of ``metrics.jsonl``, under names with a slash for each level.

    A list with a value a task is spread over the tasks' names, other lists are left out.
    """
    found: dict[str, float] = {}
    for name, value in row.items():
        if name == "generation":
            continue
        if isinstance(value, Mapping):
            inner = scalars_of(value, tasks)
        elif isinstance(value, list) and len(value) == len(tasks) and name != "archive":
            inner = scalars_of(dict(zip(tasks, value, strict=True)), ())
        else:
            if isinstance(value, (int, float)):
                found[name] = float(value)
            continue
        found |= {f"{name}/{key}": number for key, number in inner.items()}
    return found


def _import(name: LoggerName) -> ModuleType:
    package = _PACKAGES[name]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"--log {name}: expected the package {package}, which cannot be imported ({error}): "
            f"pip install {package}, or leave --log {name} out"
        ) from error
