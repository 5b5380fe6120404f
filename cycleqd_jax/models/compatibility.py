"""Whether models can be merged at all, told from their folders before a weight is read.

What makes the sum of weights or the experts' scores meaningless is refused: another architecture,
other token ids, another way to split a text, other special tokens, another chat template. What the
merge overrides with the base's (dtype, padding, context length, ids that end a text) is told.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import check_weights
from cycleqd_jax.models.lora import adapter_base, check_adapter, is_adapter
from cycleqd_jax.models.tokenizer import (
    TokenizerFingerprint,
    load_tokenizer,
    tokenizer_fingerprint,
)

# Fields of a config in which models whose weights still add up may differ.
_TOLD_FIELDS = {
    "dtype": "weights are stored in another dtype",
    "max_positions": "the context has another length",
    "bos_id": "config.json names another id that begins a text",
    "eos_ids": "config.json names other ids that end a text",
    "pad_id": "config.json names another id for padding",
}
# Padding is never seen by a model: fine-tuning often adds a token for it, or takes another one.
_TOLD_TOKENS = frozenset({"pad_token"})


def check_family(base: Path, experts: Mapping[str, Path]) -> list[str]:
    """Hold every expert's folder against the base's; only headers and tokenizers are read.

    Args:
        base: folder of the base model.
        experts: expert name -> folder of a model or of a PEFT adapter.

    Returns:
        What differs without harm, a sentence each.

    Raises:
        ValueError: a folder that cannot be loaded (see `load_model`, `load_adapter`), or experts
            that cannot be merged into the base: every reason, a line each, with both values.
    """
    config = check_weights(base)
    fingerprint = tokenizer_fingerprint(load_tokenizer(base))
    reasons: list[str] = []
    notes: list[str] = []
    for folder in experts.values():
        differences: list[tuple[bool, str]] = []
        if is_adapter(folder):
            check_adapter(folder, config)
            differences += _adapter_differences(base, folder)
        else:
            differences += _config_differences(config, check_weights(folder), base, folder)
        # An adapter speaks the base's language unless it brings a tokenizer of its own.
        if not is_adapter(folder) or (folder / "tokenizer.json").is_file():
            other = tokenizer_fingerprint(load_tokenizer(folder))
            prefix = f"{folder}: tokenizer differs from the base's in {base}: "
            found = tokenizer_differences(fingerprint, other)
            differences += [(fatal, prefix + message) for fatal, message in found]
        reasons += [message for fatal, message in differences if fatal]
        notes += [message for fatal, message in differences if not fatal]
    if reasons:
        raise ValueError("\n".join(reasons))
    return notes


def tokenizer_differences(
    base: TokenizerFingerprint, expert: TokenizerFingerprint
) -> Iterator[tuple[bool, str]]:
    """What differs between two tokenizers, as pairs of "forbids a merge" and message.

    Of vocabularies the token with the lowest id is named.
    """
    if base.vocab != expert.vocab:
        pairs = {**expert.vocab, **base.vocab}
        changed = [token for token in pairs if base.vocab.get(token) != expert.vocab.get(token)]
        token = min(changed, key=lambda token: (pairs[token], token))
        yield (
            True,
            f"token {token!r}: expected id {base.vocab.get(token)}, "
            f"found {expert.vocab.get(token)} ({len(changed)} tokens differ)",
        )
    for name in sorted({*base.special_tokens, *expert.special_tokens}):
        wanted, found = base.special_tokens.get(name), expert.special_tokens.get(name)
        if wanted != found:
            message = f"special token {name}: expected {wanted!r}, found {found!r}"
            yield name not in _TOLD_TOKENS, message
    if base.chat_template != expert.chat_template:
        where = _first_difference(base.chat_template, expert.chat_template)
        yield True, f"chat template: {where}"
    if base.model != expert.model:
        yield True, f"splitting rules: {_first_difference(base.model, expert.model)}"


def _config_differences(
    base: LlamaConfig, expert: LlamaConfig, base_folder: Path, folder: Path
) -> Iterator[tuple[bool, str]]:
    for field in fields(LlamaConfig):
        wanted, found = getattr(base, field.name), getattr(expert, field.name)
        if wanted == found:
            continue
        values = f"{field.name}: expected {wanted}, found {found}"
        if field.name in _TOLD_FIELDS:
            told = _TOLD_FIELDS[field.name]
            yield False, f"{folder}: {told} than the base's ({base_folder}): {values}"
        else:
            yield True, f"{folder}: architecture differs from the base's ({base_folder}): {values}"


def _adapter_differences(base: Path, folder: Path) -> Iterator[tuple[bool, str]]:
    named: Any = adapter_base(folder)
    if named and Path(str(named)).name != base.name:
        yield (
            False,
            f"{folder}: the adapter names another base ({named}) than {base}: "
            "it is right only if the two are the same model",
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
