"""What a run needs before its first generation: models, basis, problems, sandbox, all checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cycleqd_jax.merging.decomposition import DecompositionReport
from cycleqd_jax.merging.spectral import FLOAT32_EPS, decompose
from cycleqd_jax.merging.task_vector import task_vector
from cycleqd_jax.models.convert import load_model
from cycleqd_jax.models.specs import LlamaConfig, roles
from cycleqd_jax.models.tokenizer import (
    check_same_architecture,
    check_same_tokenizer,
    load_tokenizer,
)
from cycleqd_jax.runs.basis_cache import cached_decomposition
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.tasks.base import Problem, Task
from cycleqd_jax.tasks.registry import make_tasks


@dataclass(frozen=True)
class Workspace:
    """The checked inputs of a run.

    Attributes:
        config: what was asked for.
        architecture: of base and experts.
        base: the base's parameters.
        experts: expert name → parameters.
        basis: the experts' task vectors as rank-one directions.
        report: how much of every task vector the basis keeps.
        tokenizer: the base's.
        tasks: the skills, one archive each.
    """

    config: RunConfig
    architecture: LlamaConfig
    base: Any
    experts: Mapping[str, Any]
    basis: Any
    report: DecompositionReport
    tokenizer: Any
    tasks: Sequence[Task]

    def problems(self, split: Any, count: int, seed: int) -> dict[str, Sequence[Problem]]:
        """Draw problems of every task."""
        return {
            task.name: task.problems(split, count, seed=seed, difficulty=self.config.difficulty)
            for task in self.tasks
        }


def open_workspace(config: RunConfig, cache: Path | None = None) -> Workspace:
    """Load and check everything a run starts from.

    Args:
        config: what to run.
        cache: folder where decompositions are kept from run to run; None keeps none.

    Raises:
        ValueError: an unknown task, a folder that is no model, an expert of another architecture,
            or with another tokenizer than the base.
    """
    tasks = make_tasks(config.tasks)
    architecture, base = load_model(config.base)
    tokenizer = load_tokenizer(config.base)
    experts = {}
    for name, folder in config.experts.items():
        other, params = load_model(folder)
        check_same_architecture({config.base: architecture, folder: other})
        check_same_tokenizer(Path(config.base), Path(folder))
        experts[name] = params
    policy = roles(architecture)
    basis, report = cached_decomposition(
        cache,
        [Path(config.base), *map(Path, config.experts.values())],
        {"rank": config.rank, "noise": FLOAT32_EPS, "method": "gram"},
        policy,
        lambda: decompose(
            [task_vector(params, base) for params in experts.values()],
            policy,
            config.rank,
            base=base,
        ),
    )
    return Workspace(
        config=config,
        architecture=architecture,
        base=base,
        experts=experts,
        basis=basis,
        report=report,
        tokenizer=tokenizer,
        tasks=tasks,
    )
