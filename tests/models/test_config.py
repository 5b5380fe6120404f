import dataclasses
from typing import Any

import pytest

from cycleqd_jax.models.config import LlamaConfig, RopeScaling

TINY = LlamaConfig(64, 32, 48, 3, 4, 2, 8, tie_embeddings=False)
LLAMA3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
SCALED = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_the_old_form_of_config_is_read() -> None:
    config = LlamaConfig.from_hf({**LLAMA3_8B, "rope_scaling": SCALED})
    assert config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert config.rope_theta == 500_000.0
    assert (config.dtype, config.head_dim, config.eos_ids) == ("bfloat16", 128, (128001, 128009))


def test_the_new_form_of_config_gives_the_same() -> None:
    old = LlamaConfig.from_hf({**LLAMA3_8B, "rope_scaling": SCALED})
    new = {k: v for k, v in LLAMA3_8B.items() if k not in ("rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {**SCALED, "rope_theta": 500000.0}, "dtype": "bfloat16"}
    assert LlamaConfig.from_hf(new) == old


@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, 1.0, 4.0, 512)])
@pytest.mark.parametrize("eos", [(), (2,), (2, 5)])
@pytest.mark.parametrize(
    "own",
    [
        {},
        {"architecture": "mistral", "sliding_window": 7},
        {"architecture": "mistral"},
        {"architecture": "qwen2"},
    ],
)
def test_to_hf_is_read_back(
    scaling: RopeScaling | None, eos: tuple[int, ...], own: dict[str, Any]
) -> None:
    config = dataclasses.replace(TINY, rope_scaling=scaling, eos_ids=eos, dtype="float16", **own)
    assert LlamaConfig.from_hf(config.to_hf()) == config


MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN25_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_mistral_has_a_window_unless_it_is_null() -> None:
    assert LlamaConfig.from_hf(MISTRAL_7B).sliding_window == 4096
    assert LlamaConfig.from_hf({**MISTRAL_7B, "sliding_window": None}).sliding_window is None
    absent = {k: v for k, v in MISTRAL_7B.items() if k != "sliding_window"}
    # transformers takes 4096 where the key is missing, and 8 key heads.
    assert LlamaConfig.from_hf({**absent, "sliding_window": 4096}) == LlamaConfig.from_hf(absent)
    absent.pop("num_key_value_heads")
    assert LlamaConfig.from_hf(absent).num_kv_heads == 8
    assert LlamaConfig.from_hf({**absent, "num_key_value_heads": None}).num_kv_heads == 32


def test_qwen2_has_biases_and_a_window_that_is_off() -> None:
    config = LlamaConfig.from_hf(QWEN25_05B)
    assert (config.architecture, config.attention_bias) == ("qwen2", True)
    assert (config.sliding_window, config.head_dim) == (None, 64)
    with pytest.raises(ValueError, match="use_sliding_window=True is not implemented"):
        LlamaConfig.from_hf({**QWEN25_05B, "use_sliding_window": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is not implemented, expected one of 'llama'"),
        ({"model_type": "qwen2"}, r"architectures \['LlamaForCausalLM'\] is not implemented"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias=True is not implemented, expected False"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented, expected 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not implemented"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types with sliding_attention"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not implemented"),
        ({"hidden_size": None}, "config.json: .*NoneType"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not implemented"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "expected the key 'factor'"),
        ({"torch_dtype": "float64"}, "dtype must be one of"),
        ({"num_key_value_heads": 5}, "multiple of num_kv_heads"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf({**LLAMA3_8B, **change}, "some/config.json")


def test_a_missing_size_is_named_with_the_file() -> None:
    data = {k: v for k, v in LLAMA3_8B.items() if k != "hidden_size"}
    with pytest.raises(ValueError, match=r"some/config.json: expected the key 'hidden_size'"):
        LlamaConfig.from_hf(data, "some/config.json")


def test_unknown_options_that_are_off_are_accepted() -> None:
    data = {**LLAMA3_8B, "sliding_window": None, "new_flag": False, "_attn_implementation": "sdpa"}
    assert LlamaConfig.from_hf(data) == LlamaConfig.from_hf(LLAMA3_8B)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"sliding_window": 4}, "sliding_window is implemented for mistral"),
        ({"sliding_window": 0, "architecture": "mistral"}, "sliding_window must be at least 1"),
    ],
)
def test_sizes_that_make_no_model_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
