"""What a search needs on a mesh of devices, before it runs: memory, bytes read, operations.

    python -m cycleqd_jax.plan --model llama3-8b --experts 3 --rank 256 --candidates 32 --mesh 8x1

Arrays are counted from the leaf table and the shardings of `cycleqd_jax.sharding`, factors in the
weights' dtype; what programs need besides their arguments is estimated from shapes. What a run of
`experiments/evolve.py` needs besides, its ``--dry-run`` says. Nothing is allocated and no device is
needed.

Times are limits, not forecasts: bytes over the published bandwidth and operations over the
published peak of the chip, communication left out. No program is faster.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.chips import CHIPS, Chip
from cycleqd_jax.merging.spectral import MatrixFactors, gain_layout, is_factors
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import load_config
from cycleqd_jax.models.programs import prefill_pieces
from cycleqd_jax.models.schedule import prompt_bucket
from cycleqd_jax.models.specs import leaf_table
from cycleqd_jax.sharding import MODEL, POPULATION, AnyMesh, abstract_mesh, mesh_shape
from cycleqd_jax.workload import (
    MODELS,
    Arrays,
    Workload,
    abstract_arrays,
    device_bytes,
    device_size,
)


@dataclass(frozen=True)
class Plan:
    """What a search needs.

    Attributes:
        config: the model.
        work: one generation.
        mesh: sizes of ``population`` and ``model``.
        memory: part -> bytes on one device, all that is alive at the busiest moment of breeding
            and decoding.
        programs: "build", "prefill" and "decode" -> bytes that the program alone needs on one
            device: arguments, results and what lies between.
        bytes_read: phase -> bytes that one device reads or writes in a generation.
        flops: phase -> operations of one device in a generation.
    """

    config: LlamaConfig
    work: Workload
    mesh: tuple[int, int]
    memory: Mapping[str, int]
    programs: Mapping[str, int]
    bytes_read: Mapping[str, float]
    flops: Mapping[str, float]

    @property
    def total(self) -> int:
        """Bytes on one device at the busiest moment."""
        return sum(self.memory.values())

    def limits(self, chip: Chip) -> dict[str, tuple[float, float]]:
        """Phase -> seconds that bandwidth and arithmetic need at least for a generation."""
        return {
            phase: (self.bytes_read[phase] / chip.bandwidth, self.flops[phase] / chip.flops)
            for phase in self.flops
        }


def make_plan(config: LlamaConfig, mesh: AnyMesh, work: Workload) -> Plan:
    """Count a search's arrays, bytes and operations.

    Raises:
        ValueError: the mesh does not divide the model or the rows, or a text does not fit the
            context.
    """
    if work.prompt + work.new > config.max_positions:
        raise ValueError(
            f"a prompt of {work.prompt} and {work.new} new tokens do not fit the context: expected "
            f"at most {config.max_positions} tokens (max_positions)"
        )
    arrays = abstract_arrays(config, mesh, work)
    sizes = mesh.shape[POPULATION], mesh.shape[MODEL]
    weights, factors = device_bytes(arrays.params), device_bytes(arrays.basis)
    one = 4 * gain_layout(arrays.basis).size
    memory = {"weights": weights, "factors": factors, "gains": one * work.candidates}
    if work.builds:
        memory["child"] = decoded = weights
    else:
        memory["norms"] = _vector_bytes(config, work.candidates)
        # One set of gains a row, while tokens are generated.
        memory["gains of rows"] = one * (work.rows // sizes[0])
        decoded = weights + factors + memory["norms"] + memory["gains"]
    memory["cache"] = device_bytes(arrays.cache)
    prompts = memory["cache"] * prompt_bucket(work.prompt) // work.slots
    between = _temporaries(config, sizes, work)
    programs = {
        "build": weights + factors + one + weights + between["build"],
        "prefill": decoded + prompts + between["prefill"],
        "decode": decoded + memory.get("gains of rows", 0) + memory["cache"] + between["decode"],
    }
    memory["activations"] = max(between.values())
    return Plan(config, work, sizes, memory, programs, *_generation(config, arrays, sizes, work))


def _temporaries(config: LlamaConfig, mesh: tuple[int, int], work: Workload) -> dict[str, int]:
    """Bytes that a program needs on one device besides arguments and results, estimated."""
    # A leaf is built a layer at a time, in float32.
    largest = max(np.prod(s.shape) for s in jax.tree.leaves(leaf_table(config)))
    width, rows = prompt_bucket(work.prompt), work.rows // mesh[0]
    logits = rows * config.vocab_size * (4 + jnp.dtype(config.dtype).itemsize) // mesh[1]
    piece = rows // prefill_pieces(rows, width)
    return {
        "build": 4 * int(largest) // mesh[1],
        "prefill": logits + _layer_bytes(config, mesh, piece, width, width),
        "decode": logits + _layer_bytes(config, mesh, rows, 1, work.slots),
    }


def _layer_bytes(
    config: LlamaConfig, mesh: tuple[int, int], rows: int, width: int, keys: int
) -> int:
    """Attention scores in float32 and rounded, or the three wide arrays of the MLP."""
    item = jnp.dtype(config.dtype).itemsize
    scores = rows * (config.num_heads // mesh[1]) * width * keys * (4 + item)
    wide = rows * width * 3 * (config.intermediate_size // mesh[1]) * item
    return max(scores, wide) + 4 * rows * width * config.hidden_size * item


def _generation(
    config: LlamaConfig, arrays: Arrays, mesh: tuple[int, int], work: Workload
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes and operations of one device, per phase."""
    item = jnp.dtype(config.dtype).itemsize
    matrices = arrays.decoded
    # Of the input embeddings only the tokens' rows are read, unless they are the head too.
    read = matrices if config.tie_embeddings else matrices.replace(embed=None)
    numbers = sum(device_size(x) for x in jax.tree.leaves(read))
    model_bytes = device_bytes(read)
    texts = work.candidates * work.prompts
    batches = -(-texts // work.rows)
    rows = work.rows / mesh[0]
    context = work.prompt + work.new / 2
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim / mesh[1]
    attention = 4 * config.num_layers * config.num_heads * config.head_dim / mesh[1]
    pieces = prefill_pieces(work.rows // mesh[0], prompt_bucket(work.prompt))
    prefill_rows = rows * work.prompt
    reads = {
        "prefill": batches * (pieces * model_bytes + prefill_rows * token * item),
        "decode": batches * work.new * (model_bytes + rows * context * token * item),
    }
    flops = {
        "prefill": batches * prefill_rows * (2 * numbers + attention * work.prompt / 2),
        "decode": batches * work.new * rows * (2 * numbers + attention * context),
    }
    if work.builds:
        moved = device_bytes(arrays.basis) + 2 * device_bytes(arrays.params)
        reads = {"build": work.candidates * float(moved), **reads}
        flops = {"build": work.candidates * _build_flops(arrays.basis, mesh), **flops}
    return reads, flops


def _build_flops(basis: Any, mesh: tuple[int, int]) -> float:
    """Operations of one device for one child: 2 m n R a matrix, split over ``model``."""
    nodes = jax.tree.leaves(basis, is_leaf=is_factors)
    return sum(
        2.0 * node.u.size * node.v.shape[-2] / mesh[1]
        for node in nodes
        if isinstance(node, MatrixFactors)
    )


def _vector_bytes(config: LlamaConfig, candidates: int) -> int:
    """The norm vectors of every candidate, as every device holds them."""
    vectors = [spec for spec in jax.tree.leaves(leaf_table(config)) if spec.role == "vector"]
    numbers = sum(int(np.prod(spec.full_shape(config.num_layers))) for spec in vectors)
    return candidates * numbers * jnp.dtype(config.dtype).itemsize


def describe(plan: Plan, chip: Chip) -> str:
    """The plan as a table for people."""
    work, (population, model) = plan.work, plan.mesh
    rank = "full rank" if work.rank is None else f"rank {work.rank}"
    how = "one candidate after another, built" if work.builds else "all candidates together"
    lines = [
        f"{work.experts} experts at {rank}, mesh {population}x{model} (population x model) of "
        f"{chip.name}",
        f"{work.candidates} candidates x {work.prompts} prompts of {work.prompt} + {work.new} "
        f"tokens, {work.rows} rows at a time, {how}",
        "",
        f"{'bytes per device':16s} {'GB':>8s}",
        *(f"  {part:14s} {size / 1e9:8.2f}" for part, size in plan.memory.items()),
        f"  {'total':14s} {plan.total / 1e9:8.2f}   of {chip.memory / 1e9:.0f} GB: "
        + ("fits" if plan.total <= chip.memory else "DOES NOT FIT"),
        "",
        f"{'per generation':16s} {'bandwidth':>10s} {'arithmetic':>10s}   at least",
    ]
    limits = plan.limits(chip)
    for phase, (bandwidth, arithmetic) in limits.items():
        least = max(bandwidth, arithmetic)
        lines.append(f"  {phase:14s} {bandwidth:8.2f} s {arithmetic:8.2f} s {least:8.2f} s")
    least = sum(map(max, limits.values()))
    lines.append(f"  {'total':14s} {'':10s} {'':10s} {least:8.2f} s")
    lines += [
        "",
        f"bandwidth {chip.bandwidth / 1e12:.2f} TB/s, {chip.flops / 1e12:.0f} TFLOP/s in bfloat16 "
        "(published peaks); communication is left out",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a plan; the exit status is 1 where it does not fit the chip, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m cycleqd_jax.plan",
        description="Memory and limits of a search on a mesh of devices; nothing is allocated.",
        formatter_class=partial(argparse.ArgumentDefaultsHelpFormatter, width=100),
    )
    add = parser.add_argument
    add("--model", default="llama3-8b", help=f"{', '.join(MODELS)}, or a model's folder")
    add("--experts", type=int, default=Workload.experts, help="number of experts")
    add("--rank", default=str(Workload.rank), help="directions per matrix and expert, or 'full'")
    add("--candidates", type=int, default=Workload.candidates, help="children a generation")
    add("--prompts", type=int, default=Workload.prompts, help="texts per candidate")
    add("--prompt", type=int, default=Workload.prompt, help="tokens of a prompt")
    add("--new", type=int, default=Workload.new, help="tokens generated for a prompt")
    add("--batch", type=int, help="texts decoded at a time; all where it is not given")
    add("--mesh", default="1x1", help="devices as POPULATIONxMODEL")
    add("--chip", default="h200", choices=sorted(CHIPS), help="whose figures are the limits")
    options = parser.parse_args(arguments)
    try:
        config = MODELS.get(options.model) or load_config(Path(options.model))
        if options.rank != "full" and not options.rank.isdecimal():
            raise ValueError(f"--rank: expected a number or 'full', found {options.rank!r}")
        work = Workload(
            experts=options.experts,
            rank=None if options.rank == "full" else int(options.rank),
            candidates=options.candidates,
            prompts=options.prompts,
            prompt=options.prompt,
            new=options.new,
            batch=options.batch,
        )
        plan = make_plan(config, abstract_mesh(mesh_shape(options.mesh)), work)
    except ValueError as error:
        parser.error(str(error))
    chip = CHIPS[options.chip]
    print(f"{options.model}: {describe(plan, chip)}")
    return 0 if plan.total <= chip.memory else 1


if __name__ == "__main__":
    raise SystemExit(main())
