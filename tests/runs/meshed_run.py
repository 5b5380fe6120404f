"""A whole run on the devices that this process has: started by `test_meshes.py`.

    python tests/runs/meshed_run.py CONFIG.json RUN MESH [LAST]

A process of its own, since the number of devices is fixed when JAX starts. With LAST it is
interrupted after that generation. Prints one JSON object: the devices, and where the weights lay.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax

from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.driver import evolve
from cycleqd_jax.runs.evaluate import Evaluator
from cycleqd_jax.runs.records.files import read_json
from cycleqd_jax.sharding import mesh_shape


def main() -> None:
    config_file, run, mesh, *last = sys.argv[1:]
    config = RunConfig.from_json(read_json(Path(config_file)))
    found: dict[str, Any] = {"devices": len(jax.devices())}
    population = Evaluator.population

    def watched(self: Any, *args: Any, phase: str, **named: Any) -> Any:
        if last and phase == f"generation-{int(last[0]) + 1:06d}":
            raise KeyboardInterrupt
        base = self._workspace.base
        found["weights"] = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
        found["on each"] = sorted(
            {
                sum(leaf.addressable_shards[i].data.nbytes for leaf in jax.tree.leaves(base))
                for i in range(len(base.embed.addressable_shards))
            }
        )
        return population(self, *args, phase=phase, **named)

    patched: Any = Evaluator
    patched.population = watched
    try:
        evolve(config, Path(run), mesh=mesh_shape(mesh), transcripts=True)
    except KeyboardInterrupt:
        found["interrupted"] = True
    print(json.dumps(found))


if __name__ == "__main__":
    main()
