"""Tokenizers of model folders, and the checks that models can be merged at all."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cycleqd_jax.models.specs import LlamaConfig

# Ids, dtype and context length may differ between models whose weights still add up.
_MERGEABLE_FIELDS = ("bos_id", "eos_ids", "pad_id", "dtype", "max_positions")


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


def check_same_tokenizer(base_folder: str | Path, expert_folder: str | Path) -> None:
    """Refuse an expert whose tokenizer is not the base's.

    Raises ValueError that names the first difference: of vocabularies the token with the lowest id,
    then special tokens, then the chat template, then the rules that split a text.
    """
    base = tokenizer_fingerprint(load_tokenizer(base_folder))
    expert = tokenizer_fingerprint(load_tokenizer(expert_folder))
    prefix = f"{expert_folder}: tokenizer differs from the base's in {base_folder}:"
    if base.vocab != expert.vocab:
        pairs = {**expert.vocab, **base.vocab}
        changed = [token for token in pairs if base.vocab.get(token) != expert.vocab.get(token)]
        token = min(changed, key=lambda token: (pairs[token], token))
        raise ValueError(
            f"{prefix} token {token!r}: expected id {base.vocab.get(token)}, "
            f"found {expert.vocab.get(token)} ({len(changed)} tokens differ)"
        )
    for name in sorted({*base.special_tokens, *expert.special_tokens}):
        wanted, found = base.special_tokens.get(name), expert.special_tokens.get(name)
        if wanted != found:
            raise ValueError(f"{prefix} special token {name}: expected {wanted!r}, found {found!r}")
    if base.chat_template != expert.chat_template:
        raise ValueError(
            f"{prefix} chat template: {_first_difference(base.chat_template, expert.chat_template)}"
        )
    if base.model != expert.model:
        raise ValueError(f"{prefix} splitting rules: {_first_difference(base.model, expert.model)}")


def check_same_architecture(configs: Mapping[str, LlamaConfig]) -> None:
    """Refuse models whose weights cannot be added up.

    `configs` maps a model's name or folder to its config; the first is the base. Raises ValueError
    that names the model, the field, and both values.
    """
    (base_name, base), *others = configs.items()
    for name, config in others:
        for field in fields(LlamaConfig):
            wanted, found = getattr(base, field.name), getattr(config, field.name)
            if field.name not in _MERGEABLE_FIELDS and wanted != found:
                raise ValueError(
                    f"{name}: architecture differs from the base's ({base_name}): {field.name}: "
                    f"expected {wanted}, found {found}"
                )


def _first_difference(base: str | None, expert: str | None) -> str:
    if base is None or expert is None:
        names = ["none" if text is None else "one" for text in (base, expert)]
        return f"expected {names[0]}, found {names[1]}"
    pairs = enumerate(zip(base, expert, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(base), len(expert)))
    start = max(0, at - 10)
    return (
        f"expected {base[start : at + 30]!r}, found {expert[start : at + 30]!r} at character {at}"
    )
