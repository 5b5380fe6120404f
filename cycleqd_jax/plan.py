"""What a search needs on a mesh of devices, before it runs: memory, bytes read, operations.

    python -m cycleqd_jax.plan --model llama3-8b --experts 3 --rank 256 --candidates 32 --mesh 8x1

Arrays are counted from the leaf table and from the same shardings that a run uses; what programs
need besides their arguments is estimated from shapes. Nothing is allocated and no device is needed.

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
from flax import struct
from jax.sharding import AbstractMesh, AxisType

from cycleqd_jax.chips import CHIPS, Chip
from cycleqd_jax.merging.layout import GainLayout
from cycleqd_jax.merging.spectral import MatrixFactors, VectorFactors, gain_layout
from cycleqd_jax.models.cache import KVCache, prefill, reshape_cache, unstack_layers
from cycleqd_jax.models.config import LlamaConfig, RopeScaling
from cycleqd_jax.models.convert import load_config
from cycleqd_jax.models.kernels import attach
from cycleqd_jax.models.programs import PREFILL_TOKENS
from cycleqd_jax.models.schedule import prompt_bucket, slot_bucket
from cycleqd_jax.models.specs import LeafSpec, leaf_table
from cycleqd_jax.sharding import (
    MODEL,
    POPULATION,
    AnyMesh,
    cache_sharding,
    check_rows,
    mesh_shape,
    replicated,
    weight_sharding,
)

_LLAMA3_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=500_000.0,
    norm_eps=1e-5,
    max_positions=8192,
    dtype="bfloat16",
)
MODELS: Mapping[str, LlamaConfig] = {
    "llama3-8b": _LLAMA3_8B,
    "llama3.2-1b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        norm_eps=1e-5,
        tie_embeddings=True,
        max_positions=131_072,
        dtype="bfloat16",
    ),
    "qwen2.5-7b": LlamaConfig(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        rope_theta=1_000_000.0,
        max_positions=32_768,
        dtype="bfloat16",
        architecture="qwen2",
    ),
}
"""Models known by name; any other is planned from its folder's `config.json`."""


@dataclass(frozen=True)
class Workload:
    """What one generation does.

    Attributes:
        experts: number of experts.
        rank: directions kept of each matrix and expert; None keeps all of them.
        candidates: children a generation.
        prompts: texts generated for each candidate.
        prompt: tokens of a prompt.
        new: tokens generated for a prompt.
        batch: texts decoded at a time, of all candidates together; None is all of them. Full-rank
            candidates are built and decoded one after another instead, ``prompts`` at a time.

    Raises:
        ValueError: a number below 1.
    """

    experts: int = 3
    rank: int | None = 256
    candidates: int = 32
    prompts: int = 8
    prompt: int = 512
    new: int = 256
    batch: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")

    @property
    def builds(self) -> bool:
        """Whether every candidate's weights are built."""
        return self.rank is None

    @property
    def rows(self) -> int:
        """Texts decoded at a time."""
        most = self.prompts * (1 if self.builds else self.candidates)
        return most if self.batch is None else min(self.batch, most)

    @property
    def slots(self) -> int:
        """Slots of the cache for each of them."""
        return slot_bucket(prompt_bucket(self.prompt) + self.new)


class Arrays(struct.PyTreeNode):
    """The arrays of a search as ``jax.ShapeDtypeStruct`` with shardings.

    Attributes:
        params: the base, layers stacked.
        basis: factors of all experts, matrices in the weights' dtype.
        gains: of one candidate.
        decoded: weights that decoding gets, layers unstacked: kernels of all candidates, or the
            built weights of one.
        cache: of the rows that are decoded at a time.
    """

    params: Any
    basis: Any
    gains: Any
    decoded: Any
    cache: Any


def abstract_arrays(config: LlamaConfig, mesh: AnyMesh, work: Workload) -> Arrays:
    """Shapes, dtypes and places of everything that is alive in a search.

    Raises:
        ValueError: the mesh does not divide the model or the rows.
    """
    check_rows(work.rows, mesh)
    table, dtype = leaf_table(config), jnp.dtype(config.dtype)

    def factors(spec: LeafSpec) -> MatrixFactors | VectorFactors:
        lead = (config.num_layers,) if spec.stacked else ()
        if spec.role == "vector":
            delta = jax.ShapeDtypeStruct((*lead, work.experts, *spec.shape), jnp.float32)
            return VectorFactors(delta=delta)
        rank = min(*spec.shape, work.rank or max(spec.shape))
        u, v = (
            jax.ShapeDtypeStruct((*lead, side, work.experts * rank), dtype) for side in spec.shape
        )
        return MatrixFactors(u=u, v=v, ranks=(rank,) * work.experts)

    params = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.full_shape(config.num_layers), dtype), table
    )
    basis = jax.tree.map(factors, table)
    layout = gain_layout(basis)
    if work.builds:
        decoded = jax.eval_shape(unstack_layers, params)
    else:
        decoded = jax.eval_shape(
            lambda *trees: unstack_layers(attach(*trees)),
            params,
            basis,
            _gains(layout, (work.candidates,)),
        )
    tokens = jax.ShapeDtypeStruct((work.rows, prompt_bucket(work.prompt)), jnp.int32)
    row = jax.ShapeDtypeStruct((work.rows,), jnp.int32)

    def filled(weights: Any, tokens: Any, row: Any) -> KVCache:
        cache = prefill(weights, config, tokens, row, row)[1]
        return reshape_cache(cache, row, work.slots)

    everywhere = replicated(mesh)
    return Arrays(
        params=_placed(params, weight_sharding(config, mesh)),
        basis=_placed(basis, weight_sharding(config, mesh, basis)),
        gains=jax.tree.map(lambda x: _on(x, everywhere), _gains(layout, ())),
        decoded=_placed(decoded, weight_sharding(config, mesh, decoded)),
        cache=_placed(jax.eval_shape(filled, decoded, tokens, row), cache_sharding(config, mesh)),
    )


def device_bytes(tree: Any) -> int:
    """Bytes of a tree on one device."""
    return sum(_device_size(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclass(frozen=True)
class Plan:
    """What a search needs.

    Attributes:
        config: the model.
        work: one generation.
        mesh: sizes of ``population`` and ``model``.
        memory: part -> bytes on one device, all that is alive at the busiest moment.
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
    piece = max(1, min(rows, PREFILL_TOKENS // width))
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
    numbers = sum(_device_size(x) for x in jax.tree.leaves(read))
    model_bytes = device_bytes(read)
    texts = work.candidates * work.prompts
    batches = -(-texts // work.rows)
    rows = work.rows / mesh[0]
    context = work.prompt + work.new / 2
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim / mesh[1]
    attention = 4 * config.num_layers * config.num_heads * config.head_dim / mesh[1]
    pieces = max(1.0, rows * work.prompt / PREFILL_TOKENS)
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
    nodes = jax.tree.leaves(basis, is_leaf=lambda n: isinstance(n, MatrixFactors | VectorFactors))
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


def _gains(layout: GainLayout, lead: tuple[int, ...]) -> Any:
    return layout.build(lambda _, leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), jnp.float32))


def _device_size(leaf: Any) -> int:
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape)))


def _on(leaf: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(_on, tree, shardings)


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
        kinds = (AxisType.Auto, AxisType.Auto)
        mesh = AbstractMesh(mesh_shape(options.mesh), (POPULATION, MODEL), axis_types=kinds)
        plan = make_plan(config, mesh, work)
    except ValueError as error:
        parser.error(str(error))
    chip = CHIPS[options.chip]
    print(f"{options.model}: {describe(plan, chip)}")
    return 0 if plan.total <= chip.memory else 1


if __name__ == "__main__":
    raise SystemExit(main())
