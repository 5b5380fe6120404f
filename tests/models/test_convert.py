import dataclasses
import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cycleqd_jax.models import convert
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import check_weights, load_config, load_model, save_model
from cycleqd_jax.models.kernels import SpectralKernel
from cycleqd_jax.models.llama import forward

CONFIG = LlamaConfig(40, 16, 24, 2, 4, 2, 4, eos_ids=(2,), bos_id=1, pad_id=0)
Make = Callable[..., Any]
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def saved(tmp_path: Path, make_params: Make) -> Path:
    """A folder with a model in it, to be damaged."""
    return save_model(tmp_path / "model", CONFIG, make_params(CONFIG, 0))


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def same_bits(a: Any, b: Any) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.dtype == b.dtype


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_round_trip_is_exact_to_the_bit(
    tied: bool, dtype: str, tmp_path: Path, make_params: Make
) -> None:
    config = dataclasses.replace(CONFIG, tie_embeddings=tied, dtype=dtype)
    params = make_params(config, 0)
    found_config, found = load_model(save_model(tmp_path / "a", config, params))
    assert found_config == config
    assert jax.tree.all(jax.tree.map(same_bits, params, found))
    save_model(tmp_path / "b", found_config, found)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_the_file_holds_the_published_names_and_orientation(saved: Path) -> None:
    params = load_model(saved)[1]
    with safe_open(saved / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        found = file.get_tensor("model.layers.1.mlp.down_proj.weight")
    np.testing.assert_array_equal(found, params.layers.down[1].T)
    generation = json.loads((saved / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 0)


def test_a_dtype_can_be_asked_for(saved: Path) -> None:
    config, params = load_model(saved, dtype="bfloat16")
    assert config.dtype == "bfloat16"
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    with pytest.raises(ValueError, match="dtype must be one of float32"):
        load_model(saved, dtype="int8")


def test_weights_beyond_a_size_go_to_shards(saved: Path, tmp_path: Path) -> None:
    config, params = load_model(saved)
    folder = save_model(tmp_path / "shards", config, params, max_shard_size=3000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert not (folder / "model.safetensors").exists()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    whole = load_file(saved / "model.safetensors")
    assert set(index["weight_map"]) == set(whole)
    for shard in shards:
        tensors = load_file(shard)
        assert sum(t.nbytes for t in tensors.values()) <= 3000 or len(tensors) == 1
        assert all(same_bits(tensor, whole[name]) for name, tensor in tensors.items())
    assert jax.tree.all(jax.tree.map(same_bits, params, load_model(folder)[1]))
    with pytest.raises(ValueError, match="max_shard_size must be at least 1 byte, got 0"):
        save_model(tmp_path / "none", config, params, max_shard_size=0)


def test_a_generation_config_is_kept(saved: Path, tmp_path: Path) -> None:
    config, params = load_model(saved)
    (saved / "tokenizer.json").write_text("{}")
    (saved / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    folder = save_model(tmp_path / "new", config, params, like=saved)
    assert (folder / "generation_config.json").read_text() == '{"eos_token_id": [2, 5]}'


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(
    dtype: str, bad: float, tmp_path: Path, make_params: Make
) -> None:
    config = dataclasses.replace(CONFIG, dtype=dtype)
    params = make_params(config, 0)
    down = params.layers.down.at[1, 3, 2].set(bad)
    folder = save_model(
        tmp_path / "m", config, params.replace(layers=params.layers.replace(down=down))
    )
    message = r"model\.safetensors: tensor model\.layers\.1\.mlp\.down_proj\.weight: expected "
    with pytest.raises(ValueError, match=message + f"finite weights, found {bad} in row 2"):
        load_model(folder)


def test_weights_that_a_dtype_cannot_hold_are_named(saved: Path) -> None:
    rewrite(saved, lambda t: t.update({Q0: t[Q0] * np.float32(1e9)}))
    with pytest.raises(ValueError, match=rf"{Q0}: expected finite .*as F32, read as float16"):
        load_model(saved, dtype="float16")
    load_model(saved, dtype="bfloat16")


SCRIPT = """
import sys
from pathlib import Path
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import NamedSharding, PartitionSpec as P
from cycleqd_jax.models.convert import load_model
from cycleqd_jax.models.specs import leaf_table
folder = sys.argv[1]
config, whole = load_model(folder)
mesh = jax.make_mesh((2, 2), ("population", "model"))
rule = {"heads": "model", "kv_heads": "model", "mlp": "model", "vocab": "model"}
def place(spec):
    axes = [rule.get(axis) for axis in spec.axes]
    return NamedSharding(mesh, P(*([None] if spec.stacked else []), *axes))
places = jax.tree.map(place, leaf_table(config))
_, params = load_model(folder, sharding=places)
def check(leaf, other, wanted):
    assert leaf.sharding == wanted, leaf.sharding
    assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()
jax.tree.map(check, params, whole, places)
assert len(params.layers.q.addressable_shards) == 4
_, copies = load_model(folder, sharding=NamedSharding(mesh, P()))
jax.tree.map(lambda a, b: check(a, b, NamedSharding(mesh, P())), copies, whole)
try:
    load_model(folder, sharding=NamedSharding(jax.make_mesh((4,), ("model",)), P("model")))
except ValueError as error:
    print(error)
"""


def test_leaves_go_to_the_devices_that_own_them(saved: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(saved)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"leaf layers\.attn_norm: expected a sharding that divides its shape \(2, 16\)", done.stdout
    )


def test_shards_load_like_one_file(saved: Path) -> None:
    expected = load_model(saved)[1]
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    weight_map = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        shard = f"model-{i % 3 + 1:05}-of-00003.safetensors"
        weight_map[name] = shard
        path = saved / shard
        save_file({**(load_file(path) if path.exists() else {}), name: tensor}, path)
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert jax.tree.all(jax.tree.map(same_bits, expected, load_model(saved)[1]))
    weight_map[Q0] = (
        "model-00002-of-00003.safetensors"
        if "1-of" in weight_map[Q0]
        else ("model-00001-of-00003.safetensors")
    )
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=f"expected tensor {Q0}, which the index puts here"):
        load_model(saved)
    weight_map[Q0] = "gone.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"gone\.safetensors: expected a shard"):
        load_model(saved)
    index.write_text("{}")
    with pytest.raises(ValueError, match="expected a 'weight_map'"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q0), f"missing tensor {Q0}: expected 21 tensors, found 20"),
        (lambda t: t.update(extra=t[Q0]), "unexpected tensor extra: .* describes 21 .* found 22"),
        (
            lambda t: t.update({Q0: np.zeros((16, 8), np.float32)}),
            rf"{Q0}: expected shape \(16, 16\) from config.json, found \(16, 8\)",
        ),
        (lambda t: t.update({Q0: t[Q0].astype(np.float64)}), f"{Q0}: expected dtype .* found F64"),
        (
            lambda t: t.update({Q0: t[Q0].astype(np.float16)}),
            "expected dtype F16 as in .*, found F32",
        ),
    ],
    ids=["missing", "extra", "misshapen", "unknown dtype", "mixed dtypes"],
)
def test_tensors_that_do_not_fit_are_named(saved: Path, change: Any, message: str) -> None:
    rewrite(saved, change)
    for read in (load_model, check_weights):
        with pytest.raises(ValueError, match=rf"model\.safetensors.*{message}"):
            read(saved)


def test_rotary_buffers_of_old_exports_are_ignored(saved: Path) -> None:
    rewrite(saved, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2)}))
    assert load_model(saved)[0] == CONFIG


def test_a_tied_model_may_repeat_its_head_but_not_change_it(
    tmp_path: Path, make_params: Make
) -> None:
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    folder = save_model(tmp_path / "m", config, make_params(config, 0))
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert load_model(folder)[1].head is None
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(
        ValueError, match=r"lm_head\.weight: expected a copy of model\.embed_tokens"
    ):
        load_model(folder)


def test_folders_without_a_model_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no such folder"):
        load_config(tmp_path / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected weights in model.safetensors .* found neither"):
        load_model(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        load_model(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        load_model(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"expected the file config\.json, found none"):
        load_model(saved)


def test_an_unsupported_option_is_refused_before_weights_are_read(saved: Path) -> None:
    set_config(saved, sliding_window=8)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"config\.json: option sliding_window=8"):
        load_model(saved)


def test_parameters_that_do_not_fit_are_not_saved(tmp_path: Path, make_params: Make) -> None:
    params = make_params(CONFIG, 0)
    gate = params.layers.gate
    kernel = SpectralKernel(base=gate, u=gate, v=gate, gain=gate)
    bad = {
        r"layers\.gate: expected an array, found SpectralKernel; materialise": kernel,
        r"layers\.gate: expected shape \(2, 16, 24\), found \(2, 16, 23\)": gate[..., 1:],
        r"layers\.gate: expected dtype float32, .*found int32": gate.astype(int),
    }
    for message, leaf in bad.items():
        with pytest.raises(ValueError, match=message):
            save_model(
                tmp_path / "m", CONFIG, params.replace(layers=params.layers.replace(gate=leaf))
            )
    with pytest.raises(ValueError, match="a tied model has no head"):
        save_model(tmp_path / "m", CONFIG, params.replace(head=None))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_replaced_only_on_demand(saved: Path, make_params: Make) -> None:
    other = make_params(CONFIG, 1)
    with pytest.raises(FileExistsError, match=r"already exists.*overwrite=True"):
        save_model(saved, CONFIG, other)
    (saved / "leftover").write_text("")
    save_model(saved, CONFIG, other, overwrite=True)
    assert jax.tree.all(jax.tree.map(same_bits, other, load_model(saved)[1]))
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model"]
    assert not (saved / "leftover").exists()


def test_a_failed_save_leaves_nothing_and_the_old_folder_whole(
    saved: Path, monkeypatch: pytest.MonkeyPatch, make_params: Make
) -> None:
    before = (saved / "model.safetensors").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert, "_write_weights", full)
    other = make_params(CONFIG, 1)
    with pytest.raises(OSError, match=r"no space left to save the model: expected .* MB free"):
        save_model(saved, CONFIG, other, overwrite=True)
    assert (saved / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model"]


def test_too_little_space_is_noticed_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_params: Make
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"found 0\.0 MB; free some"):
        save_model(tmp_path / "m", CONFIG, make_params(CONFIG, 0))
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_files_are_copied_from_another_folder(saved: Path, tmp_path: Path) -> None:
    params = load_model(saved)[1]
    with pytest.raises(ValueError, match=r"expected tokenizer files such as tokenizer.json"):
        save_model(tmp_path / "new", CONFIG, params, like=saved)
    (saved / "tokenizer.json").write_text("{}")
    (saved / "chat_template.jinja").write_text("hello")
    folder = save_model(tmp_path / "new", CONFIG, params, like=saved)
    assert (folder / "chat_template.jinja").read_text() == "hello"
    assert (folder / "tokenizer.json").read_text() == "{}"


def test_transformers_reads_the_tokenizer_and_the_generation_config(
    saved: Path, tmp_path: Path, write_tokenizer: Callable[..., Path]
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    write_tokenizer(saved)
    config, params = load_model(saved)
    folder = save_model(tmp_path / "new", config, params, like=saved)
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (folder, saved))
    assert ours.chat_template == theirs.chat_template
    assert ours("a c b")["input_ids"] == theirs("a c b")["input_ids"] == [2, 4, 3]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "own",
    [{}, {"architecture": "mistral", "sliding_window": 4}, {"architecture": "qwen2"}],
    ids=["llama", "mistral", "qwen2"],
)
def test_transformers_loads_a_saved_folder(
    tied: bool, dtype: str, own: dict[str, Any], tmp_path: Path, make_params: Make
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config = dataclasses.replace(CONFIG, tie_embeddings=tied, dtype=dtype, **own)
    params = make_params(config, 0)
    folder = save_model(tmp_path / "m", config, params, max_shard_size=4000)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert str(model.dtype) == f"torch.{dtype}"
    model = model.float()
    tokens = jnp.arange(2 * 9).reshape(2, 9) % 40
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    ours = jax.jit(forward, static_argnums=1)(wide, config, tokens)
    with torch.no_grad():
        theirs = model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()
    assert np.abs(ours - theirs).max() <= 2e-4
