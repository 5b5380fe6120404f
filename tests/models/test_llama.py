import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from cycleqd_jax.models import llama
from cycleqd_jax.models.config import LlamaConfig, RopeScaling
from cycleqd_jax.models.convert import load_model
from cycleqd_jax.models.generate import Decoder
from cycleqd_jax.models.llama import (
    attend,
    rms_norm,
    rope_frequencies,
    rope_tables,
    rotate,
    visible,
)

HERE = Path(__file__).parent
VARIANTS = ["llama32", "mistral", "qwen2", "tied_gqa", "untied_llama3", "wide_heads"]
NOT_COMMITTED = ["mistral_full", "qwen25"]
TOLERANCE = 2e-4
Make = Callable[..., Any]
forward = jax.jit(llama.forward, static_argnums=1)


def golden_model(variant: str, folder: Path) -> tuple[LlamaConfig, Any, dict[str, np.ndarray]]:
    """The golden model, loaded from a folder as any other, and its answers."""
    with np.load(HERE / "golden" / f"{variant}.npz") as data:
        golden = dict(data)
    (folder / "config.json").write_text(str(golden.pop("config")))
    weights = {k.removeprefix("weight/"): v for k, v in golden.items() if k.startswith("weight/")}
    save_file(weights, folder / "model.safetensors")
    return *load_model(folder), golden


def golden_script() -> Any:
    """The module of the script next to this file."""
    spec = importlib.util.spec_from_file_location("make_golden", HERE / "make_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prompts_of(golden: dict[str, np.ndarray]) -> list[list[int]]:
    return [row[row > 0].tolist() for row in golden["tokens"]]


def greedy_texts(golden: dict[str, np.ndarray]) -> list[list[int]]:
    """What transformers generated, up to the end-of-text token 2."""
    texts = [row[row >= 0].tolist() for row in golden["greedy"]]
    return [text[: text.index(2)] if 2 in text else text for text in texts]


def assert_same_logits(ours: Any, golden: dict[str, np.ndarray]) -> None:
    real = golden["tokens"] > 0
    assert np.abs(np.asarray(ours)[real] - golden["logits"][real]).max() <= TOLERANCE


def test_there_is_a_golden_file_for_every_kind_of_model() -> None:
    assert sorted(path.stem for path in (HERE / "golden").glob("*.npz")) == VARIANTS
    assert sorted(golden_script().VARIANTS) == sorted(VARIANTS + NOT_COMMITTED)


@pytest.mark.parametrize(
    "variant",
    [
        *VARIANTS[:3],
        *[pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS[3:]],
    ],
)
def test_logits_and_greedy_text_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    config, params, golden = golden_model(variant, tmp_path)
    assert_same_logits(forward(params, config, jnp.asarray(golden["tokens"])), golden)
    new_tokens = golden["greedy"].shape[1]
    decoder = Decoder(params, config, stop_tokens=[2], pad_token=0, max_new_tokens=new_tokens)
    assert decoder.decode(prompts_of(golden)) == greedy_texts(golden)


@pytest.mark.parametrize(
    "variant", [*NOT_COMMITTED, *[pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]]
)
def test_live_transformers_agree(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    make_golden = golden_script()
    model = make_golden.torch_model(variant)
    answers = make_golden.torch_answers(model)
    model.save_pretrained(tmp_path)
    config, params = load_model(tmp_path)
    assert_same_logits(forward(params, config, jnp.asarray(answers["tokens"])), answers)
    if variant in NOT_COMMITTED:
        decoder = Decoder(params, config, stop_tokens=[2], pad_token=0, max_new_tokens=24)
        assert decoder.decode(prompts_of(answers)) == greedy_texts(answers)


def tiny(**changes: Any) -> LlamaConfig:
    return dataclasses.replace(LlamaConfig(40, 16, 24, 2, 4, 2, 4), **changes)


def test_later_tokens_and_other_rows_do_not_change_earlier_logits(make_params: Make) -> None:
    config = tiny()
    params = make_params(config, 0)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (3, 8)))
    changed = tokens.at[0, 5:].set(7).at[1:].set(3)
    before, after = (forward(params, config, t)[0] for t in (tokens, changed))
    np.testing.assert_allclose(before[:5], after[:5], atol=1e-6)
    assert np.abs(before[5:] - after[5:]).max() > 1e-3


def test_a_window_hides_what_is_too_far_back(make_params: Make) -> None:
    config = tiny(architecture="mistral", sliding_window=3, num_layers=1)
    params = make_params(config, 0)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (1, 8)))
    before, after = (forward(params, config, t)[0] for t in (tokens, tokens.at[0, 2].set(7)))
    changed = np.abs(before - after).max(axis=-1) > 1e-4
    assert changed.tolist() == [False, False, True, True, True, False, False, False]
    at = jnp.arange(4)
    assert visible(config, at[:, None], at).sum(axis=1).tolist() == [1, 2, 3, 3]
    assert visible(tiny(), at[:, None], at).sum(axis=1).tolist() == [1, 2, 3, 4]


def test_deep_models_run_the_same_layers_as_shallow_ones(make_params: Make) -> None:
    shallow = tiny(num_layers=1)
    deep = tiny(num_layers=12)
    params = make_params(deep, 0)
    # Layers whose outputs are zero leave the residual stream as it is.
    still = params.layers.replace(
        o=params.layers.o.at[1:].set(0), down=params.layers.down.at[1:].set(0)
    )
    first = params.replace(layers=jax.tree.map(lambda leaf: leaf[:1], params.layers))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, deep.vocab_size, (2, 8)))
    np.testing.assert_allclose(
        forward(params.replace(layers=still), deep, tokens),
        forward(first, shallow, tokens),
        atol=1e-5,
    )


def test_scaled_rope_stretches_long_waves_only() -> None:
    config = tiny(head_dim=64, rope_theta=500_000.0)
    scaled = dataclasses.replace(config, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
    ratio = rope_frequencies(config) / rope_frequencies(scaled)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(8)
    assert (np.diff(ratio) > -1e-5).all()


def test_rotation_depends_on_distance_only() -> None:
    config = tiny(head_dim=8)
    q, k = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 1, 1, 8)), jnp.float32)

    @jax.jit
    def score(at_q: int, at_k: int) -> jax.Array:
        rotated = [
            rotate(x, *rope_tables(config, jnp.array([p]))) for x, p in ((q, at_q), (k, at_k))
        ]
        return jnp.sum(rotated[0] * rotated[1])

    np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_grouped_attention_equals_repeated_keys() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, heads, 4)).astype(np.float32) for heads in (6, 2, 2))
    mask = np.tril(np.ones((5, 5), bool))
    mix = jax.jit(attend)
    repeated = mix(q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2), mask)
    np.testing.assert_allclose(mix(q, k, v, mask), repeated, atol=1e-6)


def test_rms_norm_is_computed_in_float32() -> None:
    x = 300 * jnp.ones((1, 1, 8), "float16")
    normed = rms_norm(x, jnp.ones(8, "float16"), 1e-6)
    assert normed.dtype == "float16"
    np.testing.assert_allclose(normed, 1.0, atol=1e-3)


def test_logits_are_float32_for_bfloat16_weights(make_params: Make) -> None:
    config = tiny(dtype="bfloat16", tie_embeddings=True)
    params = make_params(config, 0)
    assert params.layers.q.dtype == "bfloat16"
    assert forward(params, config, jnp.ones((1, 3), int)).dtype == "float32"


@pytest.mark.parametrize("most", [4096, 8])
def test_the_tables_of_a_range_are_those_of_its_positions(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "_MOST_CONSTANT", most)
    scaling = RopeScaling(8.0, 1.0, 4.0, 64)
    config = LlamaConfig(48, 16, 24, 2, 4, 2, 4, max_positions=4096, rope_scaling=scaling)
    for start, stop in ((0, 3000), (1000, 1009)):
        expected = llama.rope_tables(config, jnp.arange(start, stop))
        for found, table in zip(llama.rope_range(config, start, stop), expected, strict=True):
            np.testing.assert_allclose(found, table, atol=2e-6)
