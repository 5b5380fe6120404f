"""What a run needs before its first generation: models, basis, problems, sandbox, all checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from cycleqd_jax.merging.decomposition import DecompositionReport, Method
from cycleqd_jax.merging.low_rank import decompose_low_rank, join_experts
from cycleqd_jax.merging.spectral import FLOAT32_EPS, decompose, expert_gains, materialise
from cycleqd_jax.merging.task_vector import task_vector
from cycleqd_jax.models.compatibility import check_family
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import load_model
from cycleqd_jax.models.lora import is_adapter, load_adapter
from cycleqd_jax.models.specs import roles
from cycleqd_jax.models.tokenizer import load_tokenizer
from cycleqd_jax.runs.basis_cache import cached_decomposition, checkpoint_digest
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.parents import BASE
from cycleqd_jax.tasks.base import Problem, Task
from cycleqd_jax.tasks.registry import make_tasks


@dataclass(frozen=True)
class Workspace:
    """The checked inputs of a run.

    Attributes:
        config: what was asked for.
        architecture: of base and experts.
        base: the base's parameters.
        experts: expert name → parameters, or the low-rank updates of a LoRA expert.
        basis: the experts' task vectors as rank-one directions.
        report: how much of every task vector the basis keeps.
        tokenizer: the base's.
        tasks: the skills, one archive each.
        digests: of the weights and configs of ``base`` and every expert, by name.
        notes: what differs between base and experts without harm, a sentence each.
    """

    config: RunConfig
    architecture: LlamaConfig
    base: Any
    experts: Mapping[str, Any]
    basis: Any
    report: DecompositionReport
    tokenizer: Any
    tasks: Sequence[Task]
    digests: Mapping[str, str]
    notes: Sequence[str] = ()

    @property
    def folders(self) -> dict[str, str]:
        """Where ``base`` and every expert lie, by name."""
        return {BASE: self.config.base, **self.config.experts}

    def expert_params(self, name: str) -> Any:
        """An expert's weights; those of a LoRA expert are built here, in the base's dtype."""
        if not is_adapter(self.config.experts[name]):
            return self.experts[name]
        gains = expert_gains(self.basis, list(self.experts).index(name))
        return jax.jit(materialise)(self.base, self.basis, gains)

    def problems(self, split: Any, count: int, seed: int) -> dict[str, Sequence[Problem]]:
        """Draw problems of every task."""
        return {
            task.name: task.problems(split, count, seed=seed, difficulty=self.config.difficulty)
            for task in self.tasks
        }


def open_workspace(config: RunConfig, cache: Path | None = None) -> Workspace:
    """Load and check everything a run starts from; an expert is a model or a PEFT adapter.

    Args:
        config: what to run.
        cache: folder where decompositions are kept from run to run; None keeps none.

    Raises:
        ValueError: an unknown task, a folder that is no model, an expert of another architecture,
            or with another tokenizer than the base.
    """
    tasks = make_tasks(config.tasks)
    folders = {name: Path(folder) for name, folder in config.experts.items()}
    notes = check_family(Path(config.base), folders)
    architecture, base = load_model(config.base)
    tokenizer = load_tokenizer(config.base)
    experts = {
        name: load_adapter(folder, architecture) if is_adapter(folder) else load_model(folder)[1]
        for name, folder in folders.items()
    }
    # "gram" needs float64, which a TPU does not have.
    method: Method = "svd" if jax.default_backend() == "tpu" else "gram"
    digests = {
        name: checkpoint_digest(folder)
        for name, folder in {BASE: Path(config.base), **folders}.items()
    }
    settings = {"rank": config.rank, "noise": FLOAT32_EPS, "method": method}
    basis, report = cached_decomposition(
        cache,
        list(digests.values()),
        settings,
        roles(architecture),
        lambda: _decompose(config, architecture, base, experts, settings),
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
        digests=digests,
        notes=notes,
    )


def _decompose(
    config: RunConfig,
    architecture: LlamaConfig,
    base: Any,
    experts: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> tuple[Any, DecompositionReport]:
    """One basis of full experts and LoRA experts, in the order of the config."""
    names = list(experts)
    adapters = [name for name in names if is_adapter(config.experts[name])]
    full = [name for name in names if name not in adapters]
    policy = roles(architecture)
    parts = []
    if full:
        vectors = [task_vector(experts[name], base) for name in full]
        parts.append(decompose(vectors, policy, base=base, **settings))
    parts += [decompose_low_rank(experts[name], policy, config.rank) for name in adapters]
    return join_experts(parts, [[*full, *adapters].index(name) for name in names])
