"""Make a family of tiny Llama experts, then breed them into an agent with all three skills.

    python experiments/quickstart.py [--seed N] [--out DIR]

Needs no download, no account and no accelerator. The first start trains the experts and keeps them
in a cache; later starts only evolve.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from cycleqd_jax.cache import default_cache
from cycleqd_jax.qd.presets import DEFAULT
from cycleqd_jax.runs.compilation import cache_compilations
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.console import main_guard, reproduce_command
from cycleqd_jax.runs.driver import evolve
from cycleqd_jax.runs.family import FamilyConfig, make_family
from cycleqd_jax.tasks.registry import TASKS, make_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of the search (default 0)")
    parser.add_argument("--out", type=Path, help="run folder (default runs/quickstart-SEED)")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="where experts are kept"
    )
    parser.add_argument(
        "--generations", type=int, default=30, help="batches of 16 children to breed"
    )
    args = parser.parse_args()

    cache_compilations(args.cache)
    started = time.perf_counter()
    family = make_family(args.cache, FamilyConfig(tasks=tuple(TASKS)), make_tasks(tuple(TASKS)))
    trained = time.perf_counter() - started
    config = RunConfig(
        base=str(family.base),
        experts={name: str(folder) for name, folder in family.experts.items()},
        tasks=tuple(TASKS),
        seed=args.seed,
        generations=args.generations,
        rank=32,
        # The paper breeds for days: two minutes need bolder steps, fewer cells, sharper selection.
        preset=replace(
            DEFAULT,
            bins=6,
            crossover_std=0.5,
            mutation_strength=0.4,
            alpha_low=0.1,
            alpha_high=1.0,
        ),
    )
    out = args.out or Path("runs") / f"quickstart-{args.seed}"
    evolve(config, out, train_seconds=trained, command=reproduce_command(), cache=args.cache)


if __name__ == "__main__":
    with main_guard():
        main()
