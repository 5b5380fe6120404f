import dataclasses
from typing import Any

import jax
import pytest

from cycleqd_jax.models.llama import forward, init_params
from cycleqd_jax.models.specs import (
    LlamaConfig,
    RopeScaling,
    leaf_paths,
    leaf_table,
    roles,
)

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
def test_to_hf_is_read_back(scaling: RopeScaling | None, eos: tuple[int, ...]) -> None:
    config = dataclasses.replace(TINY, rope_scaling=scaling, eos_ids=eos, dtype="float16")
    assert LlamaConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not implemented"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias=True is not implemented, expected False"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented, expected 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not implemented"),
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
    ],
)
def test_sizes_that_make_no_model_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_covers_every_leaf_once(tied: bool) -> None:
    config = dataclasses.replace(TINY, tie_embeddings=tied)
    params = init_params(jax.random.key(0), config)
    table = leaf_table(config)
    expected: Any = jax.tree.structure(params)
    assert jax.tree.structure(table) == expected
    names = [name for spec in jax.tree.leaves(table) for name in spec.hf_names(config.num_layers)]
    assert len(names) == len(set(names)) == 3 + 9 * config.num_layers - tied
    for spec, leaf in zip(jax.tree.leaves(table), jax.tree.leaves(params), strict=True):
        assert leaf.shape == spec.full_shape(config.num_layers)
        assert len(spec.axes) == len(spec.shape)


def test_roles_follow_the_table() -> None:
    found = dict(
        zip([path for path, _ in leaf_paths(TINY)], jax.tree.leaves(roles(TINY)), strict=True)
    )
    vectors = {path for path, role in found.items() if role == "vector"}
    assert vectors == {"layers.attn_norm", "layers.mlp_norm", "final_norm"}
    assert found["embed"] == found["head"] == "matrix"


def test_llama_3_8b_has_its_published_shape() -> None:
    config = LlamaConfig.from_hf(LLAMA3_8B)
    params = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 8_030_261_248
    assert params.layers.down.shape == (32, 14336, 4096)
    tokens = jax.ShapeDtypeStruct((2, 16), "int32")
    logits = jax.eval_shape(lambda p, t: forward(p, config, t), params, tokens)
    assert (logits.shape, logits.dtype) == ((2, 16, 128256), "float32")
