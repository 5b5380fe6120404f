import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cycleqd_jax.merging.low_rank import LowRank, decompose_low_rank
from cycleqd_jax.merging.spectral import expert_gains, materialise
from cycleqd_jax.models.compatibility import check_family
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import load_model, save_model
from cycleqd_jax.models.lora import check_adapter, is_adapter, load_adapter
from cycleqd_jax.models.specs import roles

CONFIG = LlamaConfig(40, 16, 24, 2, 4, 2, 4)
PREFIX = "base_model.model.model.layers"
Make = Callable[..., Any]
OPTIONS: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "somewhere/base",
    "r": 3,
    "lora_alpha": 6,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
    "init_lora_weights": True,
    "rank_pattern": {},
    "alpha_pattern": {},
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
}


def write_adapter(
    folder: Path, ranks: Callable[[int, str], int] = lambda layer, module: 3, **options: Any
) -> dict[str, np.ndarray]:
    """An adapter of all target modules with random factors; returns its tensors."""
    rng = np.random.default_rng(0)
    sides = {"self_attn.q_proj": (16, 16), "mlp.down_proj": (24, 16)}
    tensors = {}
    for layer in range(2):
        for module, (inner, outer) in sides.items():
            r = ranks(layer, module)
            for name, shape in {"A": (r, inner), "B": (outer, r)}.items():
                values = rng.standard_normal(shape).astype(np.float32)
                tensors[f"{PREFIX}.{layer}.{module}.lora_{name}.weight"] = values
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**OPTIONS, **options}))
    return tensors


def weights_of(base: Any, config: LlamaConfig, folder: Path) -> Any:
    """The expert's weights through the basis, as a run builds them."""
    basis, report = decompose_low_rank(load_adapter(folder, config), roles(config))
    assert report.minimum() == 1
    return jax.jit(materialise)(base, basis, expert_gains(basis, 0))


@pytest.mark.parametrize(
    ("options", "ranks", "scale"),
    [
        ({}, {}, {"q": 2.0, "down": 2.0}),
        ({"use_rslora": True}, {}, {"q": 6 / math.sqrt(3), "down": 6 / math.sqrt(3)}),
        (
            {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"model.layers.1.*q_proj": 3}},
            {"mlp.down_proj": 5},
            {"q": (2.0, 1.0), "down": 6 / 5},
        ),
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_an_adapter_is_what_torch_makes_of_it(
    options: dict[str, Any],
    ranks: Mapping[str, int],
    scale: Mapping[str, Any],
    tmp_path: Path,
    make_params: Make,
) -> None:
    torch = pytest.importorskip("torch")
    tensors = write_adapter(tmp_path, lambda _, module: ranks.get(module, 3), **options)
    base = make_params(CONFIG)
    found = weights_of(base, CONFIG, tmp_path)
    for leaf, module in {"q": "self_attn.q_proj", "down": "mlp.down_proj"}.items():
        for layer in range(2):
            a, b = (
                torch.tensor(tensors[f"{PREFIX}.{layer}.{module}.lora_{side}.weight"])
                for side in "AB"
            )
            s = scale[leaf][layer] if isinstance(scale[leaf], tuple) else scale[leaf]
            weight = torch.tensor(np.asarray(getattr(base.layers, leaf)[layer].T))
            wanted = weight + s * (b @ a)
            ours = np.asarray(getattr(found.layers, leaf)[layer].T)
            np.testing.assert_allclose(ours, wanted.numpy(), atol=1e-5)
    for same in ("k", "gate", "attn_norm"):
        assert (getattr(found.layers, same) == getattr(base.layers, same)).all()


def test_factors_keep_the_adapters_rank(tmp_path: Path) -> None:
    write_adapter(tmp_path, lambda layer, _: 3 - layer, rank_pattern={r"layers\.1\..*": 2})
    update = load_adapter(tmp_path, CONFIG)
    assert isinstance(update.layers.q, LowRank)
    assert (update.layers.q.left.shape, update.layers.q.right.shape) == ((2, 16, 3), (2, 16, 3))
    assert not update.layers.q.right[1, :, 2].any()
    assert update.layers.gate.left.shape == (2, 16, 0)
    basis, _ = decompose_low_rank(update, roles(CONFIG))
    assert (basis.layers.q.ranks, basis.layers.gate.ranks) == ((3,), (0,))


def test_layers_may_be_left_out(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if ".0." not in name}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"missing tensor {PREFIX}\.0\.self_attn\.q_proj\.lora_A"):
        load_adapter(tmp_path, CONFIG)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**OPTIONS, "layers_to_transform": 1}))
    update = load_adapter(tmp_path, CONFIG)
    assert not update.layers.q.left[0].any()
    assert update.layers.q.left[1].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "option use_dora=True is not implemented, expected False"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not implemented"),
        ({"bias": "lora_only"}, "bias='lora_only' is not implemented, expected 'none'"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not implemented, expected 'LORA'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication=.* is not implemented"),
        ({"lora_bias": True}, "lora_bias=True is not implemented"),
        ({"some_new_thing": 1}, "some_new_thing=1 is not implemented"),
        ({"r": None}, "expected the key 'r', found none"),
        ({"r": 0}, "expected ranks of at least 1, found 0"),
        ({"rank_pattern": {"q_proj": 1.5}}, r"expected ranks of at least 1, found 1\.5"),
        ({"r": 4}, r"expected shape \(4, 16\) .*rank 4 in adapter_config.json, found \(3, 16\)"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, **options)
    for read in (load_adapter, check_adapter):
        with pytest.raises(ValueError, match=rf"adapter_(config|model)\..*{message}"):
            read(tmp_path, CONFIG)


Q0 = f"{PREFIX}.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q0}.lora_B.weight"), rf"missing tensor {Q0}\.lora_B\.weight"),
        (lambda t: t.update({f"{Q0}.lora_magnitude": np.ones(3)}), "unexpected tensor .*magnitude"),
        (
            lambda t: t.update({f"{Q0}.lora_B.weight": np.ones((7, 3), np.float32)}),
            r"lora_B\.weight: expected shape \(16, 3\) .*found \(7, 3\)",
        ),
        (
            lambda t: t.update({f"{Q0}.lora_B.weight": np.ones((16, 3))}),
            r"lora_B\.weight: expected dtype F32.*found F64",
        ),
        (
            lambda t: t.update({f"{Q0}.lora_B.weight": np.full((16, 3), np.nan, np.float32)}),
            r"lora_B\.weight: expected finite weights, found nan in row 0",
        ),
    ],
    ids=["missing", "extra", "misshapen", "dtype", "not finite"],
)
def test_factors_that_do_not_fit_are_named(change: Any, message: str, tmp_path: Path) -> None:
    tensors = write_adapter(tmp_path)
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: .*{message}"):
        load_adapter(tmp_path, CONFIG)


def test_a_tied_embedding_cannot_be_adapted(tmp_path: Path) -> None:
    tensors = write_adapter(tmp_path)
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    tensors |= {name + "A": np.ones((3, 40), np.float32), name + "B": np.ones((16, 3), np.float32)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert load_adapter(tmp_path, CONFIG).embed.left.shape == (40, 3)
    with pytest.raises(ValueError, match="a tied embedding cannot be adapted"):
        load_adapter(tmp_path, dataclasses.replace(CONFIG, tie_embeddings=True))


def test_a_family_may_hold_adapters(
    tmp_path: Path, make_params: Make, write_tokenizer: Callable[..., Path]
) -> None:
    base = save_model(tmp_path / "base", CONFIG, make_params(CONFIG))
    write_tokenizer(base)
    write_adapter(tmp_path / "lora")
    assert is_adapter(tmp_path / "lora")
    assert not is_adapter(base)
    assert check_family(base, {"lora": tmp_path / "lora"}) == []
    write_tokenizer(tmp_path / "lora", vocab={"d": 6})
    with pytest.raises(ValueError, match="lora: tokenizer differs"):
        check_family(base, {"lora": tmp_path / "lora"})
    write_adapter(tmp_path / "odd", base_model_name_or_path="meta-llama/Llama-3.2-1B")
    (note,) = check_family(base, {"lora": tmp_path / "odd"})
    assert "names another base (meta-llama/Llama-3.2-1B)" in note


# What peft calls of transformers is deprecated there.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("rslora", [False, True])
def test_live_peft_agrees(rslora: bool, tmp_path: Path, make_params: Make) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    save_model(tmp_path / "base", CONFIG, make_params(CONFIG))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=rslora,
        target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"],
        rank_pattern={"v_proj": 2, "model.layers.1.mlp.down_proj": 6},
        alpha_pattern={"q_proj": 3},
    )
    model = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight))
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    base = load_model(tmp_path / "base")[1]
    found = weights_of(base, CONFIG, tmp_path / "lora")
    wanted = load_model(tmp_path / "merged")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted)
    assert jnp.abs(wanted.embed - base.embed).max() > 0.1
