"""Make a family of tiny Llama experts, then breed them into an agent with all three skills.

    python experiments/quickstart.py [--seed N] [--out DIR]

Needs no download, no account and no accelerator. The first start trains the experts and keeps them
in a cache; later starts only evolve.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cycleqd_jax.cache import default_cache
from cycleqd_jax.runs.command import Command
from cycleqd_jax.runs.compilation import cache_compilations
from cycleqd_jax.runs.console import main_guard
from cycleqd_jax.runs.launch import launch
from cycleqd_jax.runs.quickstart import quickstart_config
from cycleqd_jax.runs.watching.watch import Watch


@dataclass(frozen=True)
class Quickstart:
    """What can be chosen; `evolve.py` takes the rest.

    Attributes:
        seed: seed of the search.
        out: run folder; None is runs/quickstart-SEED.
        cache: where experts are kept.
        generations: batches of 16 children to breed.
        watch: what is shown and logged while it runs.
    """

    seed: int = 0
    out: Path | None = None
    cache: Path = field(default_factory=default_cache)
    generations: int = 30
    watch: Annotated[Watch, tyro.conf.arg(name="")] = field(default_factory=Watch)


def main() -> None:
    about = __doc__.split("\n\n", maxsplit=1)[0]
    chosen = tyro.cli(Quickstart, description=about)
    cache_compilations(chosen.cache)
    started = time.perf_counter()
    config = quickstart_config(chosen.cache, seed=chosen.seed, generations=chosen.generations)
    trained = time.perf_counter() - started
    out = chosen.out or Path("runs") / f"quickstart-{chosen.seed}"
    command = Command(run=config, watch=chosen.watch, out=out, cache=chosen.cache)
    launch(command, train_seconds=trained)


if __name__ == "__main__":
    with main_guard():
        main()
