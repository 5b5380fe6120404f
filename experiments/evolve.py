"""Breed experts of your own by CycleQD.

    python experiments/evolve.py --base DIR --experts coding=DIR shell=DIR … --tasks coding shell …

Base and experts are Hugging Face folders of one architecture with one tokenizer; an expert may also
be the folder of a PEFT LoRA adapter.
"""

import argparse
import dataclasses
from pathlib import Path

from cycleqd_jax.cache import default_cache
from cycleqd_jax.qd.presets import DEFAULT, PRESETS
from cycleqd_jax.runs.compilation import cache_compilations
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.console import main_guard, parse_experts, reproduce_command
from cycleqd_jax.runs.driver import evolve

# What the command line sets, besides the models, tasks and folders.
_NUMBERS = {
    "seed": "of everything random",
    "generations": "batches of children",
    "children": "children a generation",
    "problems": "search problems a child is scored on, per task",
    "final_problems": "validation problems that decide among the finalists, per task",
    "test_problems": "held-out problems of the final table, per task",
    "difficulty": "of the problems",
    "rank": "directions kept per matrix and expert (default: all)",
    "max_new_tokens": "longest answer",
    "repeats": "attempts at every problem; the table shows the standard errors",
}
_MEASURES = {
    "temperature": "of the models' words (0: the likeliest)",
    "step_seconds": "what a program or call of an environment may take",
    "episode_seconds": "what the environment may take in all of an episode",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--experts", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="a name, or MODULE:CLASS"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/evolve"), help="run folder")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="what starts share")
    parser.add_argument(
        "--preset", choices=PRESETS, default="default", help="crossover, mutation, selection, …"
    )
    parser.add_argument("--bins", type=int, default=DEFAULT.bins, help="grid bins per task")
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    for name, meaning in _NUMBERS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=defaults[name], help=meaning
        )
    for name, meaning in _MEASURES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=float, default=defaults[name], help=meaning
        )
    parser.add_argument(
        "--transcripts", action="store_true", help="write every episode to OUT/transcripts"
    )
    args = parser.parse_args()

    cache_compilations(args.cache)
    config = RunConfig(
        base=str(args.base),
        experts=parse_experts(args.experts),
        tasks=tuple(args.tasks),
        # The ranges of a preset are of its own tasks: here the experts' scores decide.
        preset=dataclasses.replace(PRESETS[args.preset], bins=args.bins, ranges=None),
        **{name: getattr(args, name) for name in [*_NUMBERS, *_MEASURES]},
    )
    evolve(
        config,
        args.out,
        transcripts=args.transcripts,
        command=reproduce_command(),
        cache=args.cache,
    )


if __name__ == "__main__":
    with main_guard():
        main()
