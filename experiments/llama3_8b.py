"""CycleQD as in its paper: Llama 3 8B Instruct, experts in coding, databases and operating systems.

    python experiments/llama3_8b.py --dry-run --chip h200
    CYCLEQD_DATA=DIR python experiments/llama3_8b.py --base DIR --experts coding=DIR db=DIR os=DIR

It is `evolve.py` with other defaults, all of which the command line or a file may change. A dry run
on a machine without the weights plans with the architecture's shapes and checks all the rest.
"""

from typing import Any

from cycleqd_jax.runs.command import parse_command
from cycleqd_jax.runs.console import main_guard
from cycleqd_jax.runs.launch import launch

SETTINGS: dict[str, Any] = {
    "base": "models/Meta-Llama-3-8B-Instruct",
    "experts": {
        "coding": "models/expert-coding",
        "db": "models/expert-db",
        "os": "models/expert-os",
    },
    # The paper's problems, prompts and scores.
    "tasks": ["mbpp+/paper", "dbbench/paper", "osbench/paper"],
    "out": "runs/llama3-8b",
    "architecture": "llama3-8b",
    # The paper's algorithm, 15 bins a task, 1 200 generations.
    "preset": {"name": "paper", "bins": 15},
    "generations": 1200,
    # Ours, not the paper's. It merges whole task vectors; three of them at full rank do not fit one
    # device: the plan says 82 GB at rank 256 and 122 GB at 1024, of an H200's 141 (see --dry-run).
    # 256 directions a matrix and expert are kept, and the report says how much of the experts that
    # is. With --mesh weights and directions are split over several devices.
    "rank": 256,
    "problems": 32,
    # All that the smallest of the three, osbench/paper, has in these splits.
    "final_problems": 19,
    "test_problems": 46,
    "max_new_tokens": 512,
    "checkpoint_every": 25,
}
"""What is not said here is as in `evolve.py`."""


def main() -> None:
    about = __doc__.split("\n\n", maxsplit=1)[0]
    launch(parse_command(defaults=SETTINGS, description=about))


if __name__ == "__main__":
    with main_guard():
        main()
