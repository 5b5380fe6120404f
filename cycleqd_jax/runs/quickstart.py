"""The quickstart's family and settings: what the quickstart runs and the benchmarks measure."""

from dataclasses import replace
from pathlib import Path

from cycleqd_jax.qd.presets import DEFAULT
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.family import FamilyConfig, make_family
from cycleqd_jax.tasks.registry import TASKS, make_tasks

# The paper breeds for days: two minutes need bolder steps, fewer cells, sharper selection.
PRESET = replace(
    DEFAULT, bins=6, crossover_std=0.5, mutation_strength=0.4, alpha_low=0.1, alpha_high=1.0
)


def quickstart_config(cache: Path, *, seed: int = 0, generations: int = 30) -> RunConfig:
    """The settings of a quickstart; its models are trained first where the cache lacks them."""
    tasks = tuple(TASKS)
    family = make_family(cache, FamilyConfig(tasks=tasks), make_tasks(tasks))
    return RunConfig(
        base=str(family.base),
        experts={name: str(folder) for name, folder in family.experts.items()},
        tasks=tasks,
        seed=seed,
        generations=generations,
        rank=32,
        preset=PRESET,
    )
