"""What breeds in a run: the experts as first parents, and the emitter of the preset."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.merging.spectral import expert_gains
from cycleqd_jax.models.cache import stack_layers
from cycleqd_jax.qd.emitter import CycleQDEmitter
from cycleqd_jax.runs.workspace import Workspace


def first_parents(workspace: Workspace) -> Any:
    """The experts' gains, leaves (E, ...) in the order of the config."""
    number = jnp.arange(len(workspace.config.experts), dtype=jnp.int32)
    return jax.vmap(partial(expert_gains, workspace.layout))(number)


def make_emitter(workspace: Workspace, expert_scores: np.ndarray) -> CycleQDEmitter:
    """The emitter of the run's preset.

    Args:
        workspace: the checked inputs.
        expert_scores: (E, K) of the experts on the search problems.
    """
    config = workspace.config
    # Only this one asks for more than shapes: the sizes of the directions, which it computes here.
    arrays = config.preset.crossover == "slerp"
    return config.preset.build_emitter(
        stack_layers(workspace.basis) if arrays else workspace.layout,
        config.children,
        len(config.tasks),
        expert_of_archive=experts_of_tasks(list(config.experts), config.tasks, expert_scores),
    )


def experts_of_tasks(
    experts: list[str], tasks: Sequence[str], scores: np.ndarray
) -> tuple[int, ...]:
    """Return the expert whose directions serve each archive.

    The one of the task's name, or else the one that scores best on the task (the first on a tie;
    a score that is not finite counts as the lowest).
    """
    known = np.where(np.isfinite(scores), scores, -np.inf)
    return tuple(
        experts.index(task) if task in experts else int(np.argmax(known[:, k]))
        for k, task in enumerate(tasks)
    )
