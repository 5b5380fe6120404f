"""Tokenizers of model folders, and what two of them must share."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TokenizerFingerprint:
    """What two tokenizers must share: token ids, special tokens, chat template, segmentation."""

    vocab: Mapping[str, int]
    special_tokens: Mapping[str, Any]
    chat_template: str | None
    model: str | None


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's tokenizer, as `transformers.AutoTokenizer` reads it.

    Raises ValueError for a folder without one.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a model folder, found no such folder")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(f"{folder}: expected tokenizer.json or tokenizer.model, found neither")
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: tokenizer files are not readable: {error}") from error


def tokenizer_fingerprint(tokenizer: Any) -> TokenizerFingerprint:
    """Everything about a tokenizer that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = None
    if backend is not None:
        data = json.loads(backend.to_str())
        # The vocabulary is compared on its own, so that a difference in it can be named.
        data.get("model", {}).pop("vocab", None)
        parts = {key: data.get(key) for key in ("normalizer", "pre_tokenizer", "model")}
        model = json.dumps(parts, sort_keys=True)
    return TokenizerFingerprint(
        vocab=dict(tokenizer.get_vocab()),
        special_tokens={name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        chat_template=tokenizer.chat_template,
        model=model,
    )
