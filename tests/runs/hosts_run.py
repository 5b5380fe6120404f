"""One process of a run of several: started by `test_hosts.py`.

    python tests/runs/hosts_run.py CONFIG.json RUN CACHE [PORT PROCESS PROCESSES]

Prints a digest of the final repertoire. The rest is real, down to the models and the sandbox.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cycleqd_jax.qd.compact import compact
from cycleqd_jax.runs import driver
from cycleqd_jax.runs.compilation import cache_compilations
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.console import main_guard
from cycleqd_jax.runs.hosts.joining import joined_hosts
from cycleqd_jax.runs.rebuild import digests
from cycleqd_jax.runs.records.files import read_json
from cycleqd_jax.runs.search import Search


def main() -> None:
    config_file, run, cache, *others = sys.argv[1:]
    where: Any = ()
    if others:
        port, process, processes = map(int, others)
        where = (f"127.0.0.1:{port}", process, processes)
    config = RunConfig.from_json(read_json(Path(config_file)))
    patched: Any = Search
    search_run = Search.run

    def report(self: Search) -> None:
        search_run(self)
        state = jax.tree.map(lambda leaf: np.asarray(leaf)[None], compact(self.repertoire))
        print(f"repertoire {digests(state)[0]}", flush=True)

    patched.run = report
    with joined_hosts(*where) as hosts:
        cache_compilations(Path(cache))
        print("started", flush=True)
        driver.evolve(
            config, Path(run), transcripts=True, command="run", cache=Path(cache), hosts=hosts
        )


if __name__ == "__main__":
    with main_guard():
        main()
