"""Breed experts of your own by CycleQD.

    python experiments/evolve.py --base DIR --experts coding=DIR shell=DIR … --tasks coding shell …
    python experiments/evolve.py --config FILE.yaml [--dry-run]

Base and experts are Hugging Face folders of one architecture with one tokenizer; an expert may also
be the folder of a PEFT LoRA adapter. A file holds the same settings as the command line, which
overrides it.
"""

from cycleqd_jax.runs.command import parse_command
from cycleqd_jax.runs.console import main_guard
from cycleqd_jax.runs.launch import launch


def main() -> None:
    launch(parse_command(description=__doc__.split("\n\n", maxsplit=1)[0]))


if __name__ == "__main__":
    with main_guard():
        main()
