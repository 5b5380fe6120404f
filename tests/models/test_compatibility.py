import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from cycleqd_jax.models.compatibility import check_family
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import save_model

CONFIG = LlamaConfig(40, 16, 24, 2, 4, 2, 4)
Make = Callable[..., Any]


@pytest.fixture
def write(tmp_path: Path, make_params: Make, write_tokenizer: Callable[..., Path]) -> Make:
    """Writes a model folder with a tokenizer, `change` in its config, the rest in its tokenizer."""

    def folder(name: str, change: dict[str, Any] | None = None, **tokenizer: Any) -> Path:
        config = dataclasses.replace(CONFIG, **(change or {}))
        save_model(tmp_path / name, config, make_params(config))
        return write_tokenizer(tmp_path / name, **tokenizer)

    return folder


def test_a_family_of_one_kind_passes_without_a_word(write: Make) -> None:
    assert check_family(write("base"), {"a": write("x"), "b": write("y")}) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": {"b": 4, "c": 3}}, r"token 'b': expected id 3, found 4 \(2 tokens"),
        ({"vocab": {"d": 6}}, r"token 'd': expected id None, found 6 \(1 tokens"),
        ({"eos_token": "<pad>"}, "special token eos_token: expected '<eos>', found '<pad>'"),
        ({"template": "other"}, "chat template: expected '{% for.*found 'other' at char"),
        ({"template": None}, "chat template: expected one, found none"),
        ({"split": pre_tokenizers.WhitespaceSplit}, "splitting rules: expected .*Whitespace"),
    ],
)
def test_another_tokenizer_is_refused(change: dict[str, Any], message: str, write: Make) -> None:
    base, expert = write("base"), write("expert", **change)
    with pytest.raises(ValueError, match=rf"expert: tokenizer differs .*base: {message}"):
        check_family(base, {"good": base, "bad": expert})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "num_layers: expected 2, found 3"),
        ({"rope_theta": 5e5}, r"rope_theta: expected 10000\.0, found 500000\.0"),
        ({"tie_embeddings": True}, "tie_embeddings: expected False, found True"),
        ({"architecture": "mistral"}, "architecture: expected llama, found mistral"),
    ],
)
def test_another_architecture_is_refused_by_field(
    change: dict[str, Any], message: str, write: Make
) -> None:
    base, expert = write("base"), write("bad", change)
    with pytest.raises(ValueError, match=rf"bad: architecture differs .*base\): {message}"):
        check_family(base, {"good": base, "bad": expert})


def test_every_reason_is_given_at_once(write: Make) -> None:
    base = write("base")
    experts = {"a": write("a", {"num_layers": 1}), "b": write("b", template="x", eos_token="<pad>")}
    with pytest.raises(ValueError, match=r"num_layers") as error:
        check_family(base, experts)
    assert len(str(error.value).splitlines()) == 3


def test_what_the_merge_overrides_is_told(write: Make) -> None:
    change = {"dtype": "bfloat16", "eos_ids": (3,), "max_positions": 99}
    base, expert = write("base"), write("expert", change, pad_token="<eos>")
    notes = check_family(base, {"expert": expert})
    wanted = [
        "max_positions: expected 2048, found 99",
        "dtype: expected float32, found bfloat16",
        "eos_ids",
        "special token pad_token: expected '<pad>', found '<eos>'",
    ]
    assert len(notes) == len(wanted)
    for text in wanted:
        assert sum(text in note for note in notes) == 1


def test_no_weight_is_read(write: Make) -> None:
    base, expert = write("base"), write("expert", {"num_layers": 1})
    for folder in (base, expert):
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-64:] = b"\xff" * 64  # not finite: loading would complain
        path.write_bytes(data)
    assert check_family(base, {"same": base}) == []
    with pytest.raises(ValueError, match="num_layers"):
        check_family(base, {"expert": expert})


def test_an_unsupported_expert_is_refused_by_name(write: Make) -> None:
    base, expert = write("base"), write("expert")
    path = expert / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "gemma"}))
    with pytest.raises(ValueError, match=r"expert/config\.json: model_type 'gemma'"):
        check_family(base, {"expert": expert})
