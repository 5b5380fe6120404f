import dataclasses
from typing import Any

import jax
import pytest

from cycleqd_jax.models.config import Architecture, LlamaConfig
from cycleqd_jax.models.llama import forward, init_params
from cycleqd_jax.models.specs import leaf_paths, leaf_table, roles

TINY = LlamaConfig(64, 32, 48, 3, 4, 2, 8, tie_embeddings=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_table_covers_every_leaf_once(tied: bool, architecture: Architecture) -> None:
    config = dataclasses.replace(TINY, tie_embeddings=tied, architecture=architecture)
    params = init_params(jax.random.key(0), config)
    table = leaf_table(config)
    expected: Any = jax.tree.structure(params)
    assert jax.tree.structure(table) == expected
    names = [name for spec in jax.tree.leaves(table) for name in spec.hf_names(config.num_layers)]
    per_layer = 9 + 3 * (architecture == "qwen2")
    assert len(names) == len(set(names)) == 3 + per_layer * config.num_layers - tied
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
    qwen = roles(dataclasses.replace(TINY, architecture="qwen2")).layers
    assert {qwen.q_bias, qwen.k_bias, qwen.v_bias} == {"vector"}


def test_llama_3_8b_has_its_published_shape() -> None:
    config = LlamaConfig(
        128_256, 4096, 14_336, 32, 32, 8, 128, rope_theta=500_000.0, dtype="bfloat16"
    )
    params = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 8_030_261_248
    assert params.layers.down.shape == (32, 14336, 4096)
    tokens = jax.ShapeDtypeStruct((2, 16), "int32")
    logits = jax.eval_shape(lambda p, t: forward(p, config, t), params, tokens)
    assert (logits.shape, logits.dtype) == ((2, 16, 128256), "float32")
