from collections.abc import Callable
from pathlib import Path

import pytest

from cycleqd_jax.models.tokenizer import load_tokenizer, tokenizer_fingerprint

Write = Callable[..., Path]


def test_a_saved_tokenizer_is_loaded(tmp_path: Path, write_tokenizer: Write) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "base"))
    assert tokenizer("a c b")["input_ids"] == [2, 4, 3]
    fingerprint = tokenizer_fingerprint(tokenizer)
    assert fingerprint.vocab["b"] == 3
    assert fingerprint.chat_template is not None
    assert "messages" in fingerprint.chat_template
    assert fingerprint.special_tokens["eos_token"] == "<eos>"


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected tokenizer\.json or tokenizer\.model, found"):
        load_tokenizer(tmp_path)
