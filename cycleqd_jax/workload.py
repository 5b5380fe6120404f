"""One generation of a search as numbers and as shapes: nothing here holds an array."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cycleqd_jax.merging.layout import GainLayout
from cycleqd_jax.merging.spectral import MatrixFactors, VectorFactors, gain_layout
from cycleqd_jax.models.cache import KVCache, prefill, reshape_cache, unstack_layers
from cycleqd_jax.models.config import LlamaConfig, RopeScaling
from cycleqd_jax.models.kernels import attach
from cycleqd_jax.models.schedule import prompt_bucket, slot_bucket
from cycleqd_jax.models.specs import LeafSpec, leaf_table
from cycleqd_jax.sharding import (
    AnyMesh,
    cache_sharding,
    check_rows,
    replicated,
    weight_sharding,
)

MODELS: Mapping[str, LlamaConfig] = {
    "llama3-8b": LlamaConfig(
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
    ),
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
    return sum(device_size(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_size(leaf: Any) -> int:
    """Numbers of one array on one device."""
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape)))


def _gains(layout: GainLayout, lead: tuple[int, ...]) -> Any:
    return layout.build(lambda _, leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), jnp.float32))


def _on(leaf: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(_on, tree, shardings)
