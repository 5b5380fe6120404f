"""The programs of a search for a mesh of devices, lowered from shapes alone.

What is returned can be compiled for devices that this machine does not have
(`jax.experimental.topologies`); the compiler then says what memory a device needs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cycleqd_jax.merging.spectral import compile_materialise
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.programs import STEPS, Programs, Prompts, Rows
from cycleqd_jax.models.schedule import prompt_bucket
from cycleqd_jax.plan import Workload, abstract_arrays
from cycleqd_jax.sharding import batch_placement, replicated, row_sharding


def lower_programs(
    config: LlamaConfig, mesh: Mesh, work: Workload
) -> dict[str, jax.stages.Lowered]:
    """Programs "build" (one candidate's weights), "prefill" and "decode" (a chunk of steps).

    Raises:
        ValueError: the mesh does not divide the model or the rows.
    """
    arrays = abstract_arrays(config, mesh, work)
    programs = Programs(config, (), batch_placement(config, mesh))

    def rows(dtype: Any = jnp.int32, width: int | None = None) -> jax.ShapeDtypeStruct:
        shape = (work.rows,) if width is None else (work.rows, width)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=row_sharding(mesh))

    one = rows()
    state = Rows(one, one, one, one, rows(jnp.bool_), one, one)
    prompts = Prompts(rows(width=prompt_bucket(work.prompt)), one, one, one, one, one)
    slots = jax.ShapeDtypeStruct((STEPS,), jnp.int32, sharding=replicated(mesh))
    build: Any = compile_materialise(arrays.params)
    live = rows(jnp.bool_)
    return {
        "build": build.lower(arrays.params, arrays.basis, arrays.gains),
        "prefill": programs.lower("enter", arrays.decoded, prompts, None, None),
        "decode": programs.lower("chunk", arrays.decoded, state, arrays.cache, live, slots, None),
    }


def needed_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of a device while a program runs: arguments, results and what lies between."""
    memory: Any = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
