"""What a model is made of: one table per architecture with a row per parameter leaf.

The table (`leaf_table`) is the only place that knows names, shapes, roles and orientation of the
weights. Initialisation, conversion in both directions, the mutation policy and sharding read it.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import flax.struct
import jax

from cycleqd_jax.models.config import LlamaConfig

Role = Literal["matrix", "vector"]


class LayerParams(flax.struct.PyTreeNode):
    """One transformer layer, or all of them stacked on axis 0 (the form every function expects).

    The biases are None where the architecture has none.
    """

    attn_norm: Any
    q: Any
    k: Any
    v: Any
    o: Any
    mlp_norm: Any
    gate: Any
    up: Any
    down: Any
    q_bias: Any = None
    k_bias: Any = None
    v_bias: Any = None


class LlamaParams(flax.struct.PyTreeNode):
    """All leaves of a model: arrays, kernels, specs, roles or gains, one per weight.

    `embed` is (vocab, hidden), `head` is (hidden, vocab) and None when the embeddings are tied;
    `layers` is a `LayerParams` whose matrices are (layers, in, out) and vectors (layers, d).
    """

    embed: Any
    layers: Any
    final_norm: Any
    head: Any = None


@dataclass(frozen=True)
class LeafSpec:
    """One leaf of the parameters.

    `shape` and `axes` (logical axis names) describe one layer in our orientation, y = x @ W.
    `hf_name` holds `{layer}` where `stacked`; `transpose` says that the file stores (out, in).
    `role` decides what merging and mutation do; `init_std` None means a vector of ones, 0 zeros.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf_name: str
    transpose: bool
    role: Role
    stacked: bool
    init_std: float | None

    def full_shape(self, num_layers: int) -> tuple[int, ...]:
        """Shape of the whole leaf, with the layer axis in front where it is stacked."""
        return (num_layers, *self.shape) if self.stacked else self.shape

    def hf_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in the file."""
        return self.shape[::-1] if self.transpose else self.shape

    def hf_names(self, num_layers: int) -> tuple[str, ...]:
        """Names of the file's tensors that make up this leaf, in layer order."""
        if not self.stacked:
            return (self.hf_name,)
        return tuple(self.hf_name.format(layer=i) for i in range(num_layers))


def leaf_table(config: LlamaConfig) -> LlamaParams:
    """The table of all leaves: `LlamaParams` of `LeafSpec`."""
    width, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # Outputs added to the residual stream are damped with depth (GPT-2), so that deep stacks start
    # at the same scale as shallow ones.
    damp = 1.0 / math.sqrt(2 * config.num_layers)

    def norm(name: str, stacked: bool = True) -> LeafSpec:
        return LeafSpec((width,), ("embed",), name, False, "vector", stacked, None)

    def matrix(
        name: str, rows: tuple[int, str], cols: tuple[int, str], scale: float = 1.0
    ) -> LeafSpec:
        return LeafSpec(
            shape=(rows[0], cols[0]),
            axes=(rows[1], cols[1]),
            hf_name=f"model.layers.{{layer}}.{name}.weight",
            transpose=True,
            role="matrix",
            stacked=True,
            init_std=scale / math.sqrt(rows[0]),
        )

    def bias(name: str, out: tuple[int, str]) -> LeafSpec | None:
        if not config.attention_bias:
            return None
        hf_name = f"model.layers.{{layer}}.self_attn.{name}.bias"
        return LeafSpec((out[0],), (out[1],), hf_name, False, "vector", True, 0.0)

    embed, mlp = (width, "embed"), (inner, "mlp")
    q_out, kv_out = (heads, "heads"), (kv_heads, "kv_heads")
    layers = LayerParams(
        attn_norm=norm("model.layers.{layer}.input_layernorm.weight"),
        q=matrix("self_attn.q_proj", embed, q_out),
        k=matrix("self_attn.k_proj", embed, kv_out),
        v=matrix("self_attn.v_proj", embed, kv_out),
        o=matrix("self_attn.o_proj", q_out, embed, damp),
        mlp_norm=norm("model.layers.{layer}.post_attention_layernorm.weight"),
        gate=matrix("mlp.gate_proj", embed, mlp),
        up=matrix("mlp.up_proj", embed, mlp),
        down=matrix("mlp.down_proj", mlp, embed, damp),
        q_bias=bias("q_proj", q_out),
        k_bias=bias("k_proj", kv_out),
        v_bias=bias("v_proj", kv_out),
    )
    vocab = config.vocab_size
    embed_spec = LeafSpec(
        (vocab, width),
        ("vocab", "embed"),
        "model.embed_tokens.weight",
        False,
        "matrix",
        False,
        0.02,
    )
    head_spec = LeafSpec(
        (width, vocab), ("embed", "vocab"), "lm_head.weight", True, "matrix", False, 0.02
    )
    return LlamaParams(
        embed=embed_spec,
        layers=layers,
        final_norm=norm("model.norm.weight", stacked=False),
        head=None if config.tie_embeddings else head_spec,
    )


def roles(config: LlamaConfig) -> LlamaParams:
    """`LlamaParams` of "matrix" | "vector": what merging does to each leaf."""
    return jax.tree.map(lambda spec: spec.role, leaf_table(config))


def leaf_paths(config: LlamaConfig) -> list[tuple[str, LeafSpec]]:
    """Every leaf of the table with its path, such as `layers.q`, in tree order."""
    flat = jax.tree_util.tree_flatten_with_path(leaf_table(config))[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="."), spec) for path, spec in flat]
