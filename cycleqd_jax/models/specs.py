"""What a Llama model is made of: its configuration and one table with a row per parameter leaf.

The table (`leaf_table`) is the only place that knows names, shapes, roles and orientation of the
weights. Initialisation, conversion in both directions, the mutation policy and sharding read it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.struct
import jax

Role = Literal["matrix", "vector"]

DTYPES = ("float32", "bfloat16", "float16")

# Keys of a config.json that do not change what the forward pass computes.
_INERT_KEYS = frozenset(
    {
        *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype"),
        *("use_cache", "initializer_range", "auto_map", "label2id", "id2label", "return_dict"),
        *("max_length", "min_length", "do_sample", "temperature", "top_p", "top_k"),
        *("repetition_penalty", "problem_type", "finetuning_task"),
        *("unsloth_version", "unsloth_fixed"),
    }
)
_READ_KEYS = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        *("rope_parameters", "rope_theta", "rope_scaling", "rms_norm_eps", "tie_word_embeddings"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    }
)
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"),
    *("num_kv_heads", "head_dim", "max_positions"),
)
# Options of the Llama family with the only value that is implemented.
_FIXED_OPTIONS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1,
}


class LayerParams(flax.struct.PyTreeNode):
    """One transformer layer, or all of them stacked on axis 0 (the form every function expects)."""

    attn_norm: Any
    q: Any
    k: Any
    v: Any
    o: Any
    mlp_norm: Any
    gate: Any
    up: Any
    down: Any


class LlamaParams(flax.struct.PyTreeNode):
    """All leaves of a model: arrays, kernels, specs, roles or gains, one per weight.

    `embed` is (vocab, hidden), `head` is (hidden, vocab) and None when the embeddings are tied;
    `layers` is a `LayerParams` whose matrices are (layers, in, out) and norms (layers, hidden).
    """

    embed: Any
    layers: Any
    final_norm: Any
    head: Any = None


@dataclass(frozen=True)
class RopeScaling:
    """The "llama3" frequency scaling of Llama 3.1 and 3.2."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class LlamaConfig:
    """Everything about a Llama model that is not a weight.

    `dtype` is the dtype of the weights; `eos_ids` are all ids that end a text. Raises ValueError
    for sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    max_positions: int = 2048
    dtype: str = "float32"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(
                    f"LlamaConfig.{name} must be at least 1, got {getattr(self, name)}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} query heads "
                f"and {self.num_kv_heads} key heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], source: str = "config.json") -> "LlamaConfig":
        """Read the content of a `config.json`, in the form of transformers 5 or older.

        Raises ValueError, naming `source` and the key, for another architecture and for every
        option that is not implemented.
        """
        _refuse_unsupported(data, source)
        try:
            heads = int(data["num_attention_heads"])
            hidden = int(data["hidden_size"])
            theta, scaling = _read_rope(data, source)
            return cls(
                vocab_size=int(data["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(data["intermediate_size"]),
                num_layers=int(data["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=int(data.get("num_key_value_heads") or heads),
                head_dim=int(data.get("head_dim") or hidden // heads),
                rope_theta=theta,
                rope_scaling=scaling,
                norm_eps=float(data.get("rms_norm_eps", 1e-6)),
                tie_embeddings=bool(data.get("tie_word_embeddings", False)),
                max_positions=int(data.get("max_position_embeddings", 2048)),
                dtype=str(data.get("dtype") or data.get("torch_dtype") or "float32"),
                bos_id=data.get("bos_token_id"),
                eos_ids=_id_tuple(data.get("eos_token_id")),
                pad_id=data.get("pad_token_id"),
            )
        except KeyError as error:
            raise ValueError(f"{source}: expected the key {error}, found none") from None

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers 4 and 5 load."""
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            rope = {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_freq_factor,
                "high_freq_factor": self.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": self.rope_scaling.original_max_positions,
            }
        eos: int | list[int] | None = list(self.eos_ids) or None
        if len(self.eos_ids) == 1:
            eos = self.eos_ids[0]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else dict(rope),
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "bos_token_id": self.bos_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_id,
            "torch_dtype": self.dtype,
            "dtype": self.dtype,
            "use_cache": True,
        }


@dataclass(frozen=True)
class LeafSpec:
    """One leaf of the parameters.

    `shape` and `axes` (logical axis names) describe one layer in our orientation, y = x @ W.
    `hf_name` holds `{layer}` where `stacked`; `transpose` says that the file stores (out, in).
    `role` decides what merging and mutation do; `init_std` None means a vector of ones.
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


def _refuse_unsupported(data: Mapping[str, Any], source: str) -> None:
    if data.get("model_type") != "llama":
        raise ValueError(
            f"{source}: model_type {data.get('model_type')!r} is not implemented, expected 'llama'"
        )
    architectures = data.get("architectures") or ["LlamaForCausalLM"]
    if list(architectures) != ["LlamaForCausalLM"]:
        raise ValueError(
            f"{source}: architectures {architectures} is not implemented, "
            "expected ['LlamaForCausalLM']"
        )
    for key, value in data.items():
        if key in _FIXED_OPTIONS:
            if value is not None and value != _FIXED_OPTIONS[key]:
                raise ValueError(
                    f"{source}: option {key}={value!r} is not implemented, "
                    f"expected {_FIXED_OPTIONS[key]!r}"
                )
        elif key in _INERT_KEYS or key in _READ_KEYS or key.startswith("_"):
            continue
        elif value not in (None, False, 0, "", [], {}):
            # A key that nobody here knows may change the mathematics: refusing is the safe side.
            raise ValueError(f"{source}: option {key}={value!r} is not implemented")


def _read_rope(data: Mapping[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    rope = dict(data.get("rope_parameters") or data.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or data.get("rope_theta") or 10_000.0)
    legacy_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", legacy_kind)
    partial = rope.pop("partial_rotary_factor", 1)
    if partial not in (None, 1):
        raise ValueError(f"{source}: option partial_rotary_factor={partial!r} is not implemented")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(
            f"{source}: rope type {kind!r} is not implemented, expected 'default' or 'llama3'"
        )
    original = rope.get("original_max_position_embeddings") or data["max_position_embeddings"]
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(original),
    )


def _id_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
