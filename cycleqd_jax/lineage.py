"""Breed any model of a run again, bit for bit, and print where it comes from.

    python -m cycleqd_jax.lineage RUN ID [--depth N]

The model is rebuilt from base, experts and the run's log, whether an archive still holds it or not,
and compared with what the log says of it. `cycleqd_jax.export` writes it as a folder.
"""

import argparse
from pathlib import Path

import jax
from rich.console import Console

from cycleqd_jax.cache import default_cache
from cycleqd_jax.runs.console import main_guard
from cycleqd_jax.runs.results.export import expert_coefficients
from cycleqd_jax.runs.results.pedigree import draw_pedigree
from cycleqd_jax.runs.results.release import PastRun


def main() -> None:
    """Parse the command line, print the tree, rebuild."""
    parser = argparse.ArgumentParser(
        prog="python -m cycleqd_jax.lineage", description=__doc__.split("\n\n", maxsplit=1)[0]
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("id", type=int, help="number of the model")
    parser.add_argument("--depth", type=int, default=6, help="generations of ancestors to print")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="what starts share")
    args = parser.parse_args()
    run, console = PastRun(args.run), Console()
    console.print(draw_pedigree(run.family, args.id, run.config.tasks, args.depth))
    workspace = run.open(args.cache)
    gains = jax.tree.map(lambda leaf: leaf[0], run.rebuild(workspace, [args.id]))
    for name, share in expert_coefficients(
        gains, workspace.layout, list(run.config.experts)
    ).items():
        console.print(
            f"expert {name}: coefficient {share.mean:.3f} ({share.low:.3f} to {share.high:.3f})"
        )
    console.print(
        f"rebuilt bit for bit from {len(run.family.ancestors(args.id))} ancestors: "
        f"{workspace.layout.size:,} gains, digest {run.family.birth(args.id).digest}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    with main_guard():
        main()
