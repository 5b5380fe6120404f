import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cycleqd_jax.models.specs import LlamaConfig
from cycleqd_jax.models.tokenizer import (
    check_same_architecture,
    check_same_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
)

VOCAB = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4, "<unk>": 5}
TEMPLATE = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
CONFIG = LlamaConfig(40, 16, 24, 2, 4, 2, 4)


def write(
    folder: Path,
    vocab: dict[str, int] | None = None,
    template: str | None = TEMPLATE,
    split: Callable[[], Any] = pre_tokenizers.Whitespace,
    **special: str,
) -> Path:
    backend = Tokenizer(models.WordLevel(vocab or VOCAB, unk_token="<unk>"))
    backend.pre_tokenizer = split()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))
    return folder


def test_a_saved_tokenizer_is_loaded(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "base"))
    assert tokenizer("a c b")["input_ids"] == [2, 4, 3]
    fingerprint = tokenizer_fingerprint(tokenizer)
    assert fingerprint.vocab == VOCAB
    assert fingerprint.chat_template == TEMPLATE
    assert fingerprint.special_tokens["eos_token"] == "<eos>"


def test_the_same_tokenizer_passes(tmp_path: Path) -> None:
    check_same_tokenizer(write(tmp_path / "base"), write(tmp_path / "expert"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": VOCAB | {"b": 4, "c": 3}}, r"token 'b': expected id 3, found 4 \(2 tokens"),
        ({"vocab": VOCAB | {"d": 6}}, r"token 'd': expected id None, found 6 \(1 tokens"),
        ({"pad_token": "<eos>"}, "special token pad_token: expected '<pad>', found '<eos>'"),
        ({"template": TEMPLATE.replace("<eos>", "!")}, "chat template: expected .*<eos>.* at char"),
        ({"template": None}, "chat template: expected one, found none"),
        ({"split": pre_tokenizers.WhitespaceSplit}, "splitting rules: expected .*Whitespace"),
    ],
)
def test_the_first_difference_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base, expert = write(tmp_path / "base"), write(tmp_path / "expert", **change)
    with pytest.raises(ValueError, match=rf"expert: tokenizer differs .*{message}"):
        check_same_tokenizer(base, expert)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected tokenizer\.json or tokenizer\.model, found"):
        load_tokenizer(tmp_path)


def test_architectures_that_add_up_pass() -> None:
    other = dataclasses.replace(CONFIG, eos_ids=(3,), dtype="bfloat16", max_positions=99)
    check_same_architecture({"base": CONFIG, "expert": other})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "num_layers: expected 2, found 3"),
        ({"rope_theta": 5e5}, r"rope_theta: expected 10000\.0, found 500000\.0"),
        ({"tie_embeddings": True}, "tie_embeddings: expected False, found True"),
    ],
)
def test_other_architectures_are_refused_by_field(change: dict[str, Any], message: str) -> None:
    configs = {"base": CONFIG, "good": CONFIG, "bad": dataclasses.replace(CONFIG, **change)}
    with pytest.raises(ValueError, match=rf"bad: architecture differs .*\(base\): {message}"):
        check_same_architecture(configs)
