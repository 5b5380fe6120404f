"""Everything about a model that is not a weight, read from a `config.json` and written to one.

The architectures are Llama (2, 3, 3.1, 3.2, TinyLlama), Mistral and Qwen2 / Qwen2.5: one forward
pass with a scaled rope, a sliding window and attention biases where the config asks for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Architecture = Literal["llama", "mistral", "qwen2"]

DTYPES = ("float32", "bfloat16", "float16")

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
# What transformers takes where a config.json has no such key; a key that is null means something
# else (as many key heads as heads, no window).
_ABSENT: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
}
# Keys that do not change what the forward pass computes.
_INERT_KEYS = frozenset(
    {
        *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype"),
        *("use_cache", "initializer_range", "auto_map", "label2id", "id2label", "return_dict"),
        *("max_length", "min_length", "do_sample", "temperature", "top_p", "top_k"),
        *("repetition_penalty", "problem_type", "finetuning_task", "tokenizer_class"),
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
# And those of one architecture. Qwen2's window counts only with use_sliding_window, which is fixed.
_OWN_READ_KEYS: Mapping[str, frozenset[str]] = {
    "llama": frozenset(),
    "mistral": frozenset({"sliding_window"}),
    "qwen2": frozenset({"sliding_window", "max_window_layers"}),
}
# Options of the family with the only value that is implemented.
_FIXED_OPTIONS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1,
    "use_sliding_window": False,
}
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"),
    *("num_kv_heads", "head_dim", "max_positions"),
)


@dataclass(frozen=True)
class RopeScaling:
    """The "llama3" frequency scaling of Llama 3.1 and 3.2."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class LlamaConfig:
    """Everything about a model of the Llama family that is not a weight.

    `dtype` is the dtype of the weights; `eos_ids` are all ids that end a text. A token sees itself
    and the `sliding_window - 1` tokens before it, or all of them where that is None;
    `attention_bias` says that queries, keys and values have one. Raises ValueError for sizes that
    do not fit together.
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
    architecture: Architecture = "llama"
    sliding_window: int | None = None

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
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.sliding_window is not None and self.architecture != "mistral":
            raise ValueError(
                f"sliding_window is implemented for mistral, got one for {self.architecture}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {self.sliding_window}")

    @property
    def attention_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.architecture == "qwen2"

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], source: str = "config") -> "LlamaConfig":
        """Read the content of a `config.json`, in the form of transformers 5 or older.

        Raises ValueError, naming `source` and the key, for another architecture and for every
        option that is not implemented.
        """
        architecture = _read_architecture(data, source)
        data = {**_ABSENT[architecture], **data}
        _refuse_unsupported(data, architecture, source)
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
                max_positions=int(data["max_position_embeddings"]),
                dtype=str(data.get("dtype") or data.get("torch_dtype") or "float32"),
                bos_id=data.get("bos_token_id"),
                eos_ids=_id_tuple(data.get("eos_token_id")),
                pad_id=data.get("pad_token_id"),
                architecture=architecture,
                sliding_window=data.get("sliding_window") if architecture == "mistral" else None,
            )
        except KeyError as error:
            raise ValueError(f"{source}: expected the key {error}, found none") from None
        except (TypeError, ValueError) as error:
            if str(error).startswith(source):
                raise
            raise ValueError(f"{source}: {error}") from error

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
        options: dict[str, dict[str, Any]] = {
            "llama": {"attention_bias": False, "mlp_bias": False},
            "mistral": {"sliding_window": self.sliding_window},
            "qwen2": {
                "use_sliding_window": False,
                "sliding_window": None,
                "max_window_layers": self.num_layers,
            },
        }
        return {
            "architectures": [_CLASSES[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            **options[self.architecture],
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


def _read_architecture(data: Mapping[str, Any], source: str) -> Architecture:
    kind = data.get("model_type")
    if kind not in _CLASSES:
        raise ValueError(
            f"{source}: model_type {kind!r} is not implemented, expected one of "
            f"{', '.join(map(repr, _CLASSES))}"
        )
    architectures = data.get("architectures") or [_CLASSES[kind]]
    if list(architectures) != [_CLASSES[kind]]:
        raise ValueError(
            f"{source}: architectures {architectures} is not implemented, "
            f"expected {[_CLASSES[kind]]}"
        )
    return kind


def _refuse_unsupported(data: Mapping[str, Any], architecture: str, source: str) -> None:
    known = _INERT_KEYS | _READ_KEYS | _OWN_READ_KEYS[architecture]
    for key, value in data.items():
        if key in _FIXED_OPTIONS:
            if value is not None and value != _FIXED_OPTIONS[key]:
                raise ValueError(
                    f"{source}: option {key}={value!r} is not implemented, "
                    f"expected {_FIXED_OPTIONS[key]!r}"
                )
        elif key == "layer_types":
            other = {*(value or ())} - {"full_attention"}
            if other:
                raise ValueError(
                    f"{source}: option layer_types with {', '.join(sorted(other))} is not "
                    "implemented, expected 'full_attention' in every layer"
                )
        elif key in known or key.startswith("_"):
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
