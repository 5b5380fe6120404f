"""Write a model of a run as a Hugging Face folder with its card, or the run's team.

    python -m cycleqd_jax.export RUN --id ID|best|aggregate|team --out DIR

Nothing but the experts and the run's log is needed: the model is bred again, bit for bit.
"""

import argparse
import shlex
import sys
from pathlib import Path

from cycleqd_jax.cache import default_cache
from cycleqd_jax.runs.console import main_guard
from cycleqd_jax.runs.results.release import PastRun, release


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(
        prog="python -m cycleqd_jax.export", description=__doc__.split("\n\n", maxsplit=1)[0]
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--id", required=True, help="number in the lineage, best, aggregate or team"
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="what starts share")
    args = parser.parse_args()
    command = shlex.join(["python", "-m", "cycleqd_jax.export", *sys.argv[1:]])
    done = release(PastRun(args.run), args.id, args.out, command=command, cache=args.cache)
    print(f"{done.what}: {done.folder}")


if __name__ == "__main__":
    with main_guard():
        main()
