"""Token rows to train on, made once on the host and kept on the device."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Corpus:
    """Rows of tokens.

    Attributes:
        tokens: (rows, time) int32.
        counts: (rows, time) bool, True where the token is a target of the loss.
    """

    tokens: Any
    counts: Any


def pack_documents(documents: Sequence[Sequence[int]], length: int, end: int) -> Corpus:
    """Join documents, each closed by ``end``, and cut the stream into rows of ``length`` tokens.

    Raises:
        ValueError: the documents together are shorter than one row.
    """
    stream = [token for document in documents for token in (*document, end)]
    rows = len(stream) // length
    if rows == 0:
        raise ValueError(f"expected documents of at least {length} tokens, found {len(stream)}")
    tokens = np.asarray(stream[: rows * length], np.int32).reshape(rows, length)
    return Corpus(tokens=jnp.asarray(tokens), counts=jnp.ones(tokens.shape, bool))


def pad_conversations(
    conversations: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int, multiple: int = 8
) -> Corpus:
    """Put one conversation in each row, padded on the right to a common length.

    Args:
        conversations: pairs of token ids and a mask of the same length, true where the assistant
            speaks.
        pad: the padding token.
        multiple: the common length is rounded up to a multiple of this.
    """
    if not conversations:
        raise ValueError("expected at least one conversation, found none")
    longest = max(len(tokens) for tokens, _ in conversations)
    length = -(-longest // multiple) * multiple
    tokens = np.full((len(conversations), length), pad, np.int32)
    counts = np.zeros((len(conversations), length), bool)
    for row, (ids, mask) in enumerate(conversations):
        tokens[row, : len(ids)] = ids
        counts[row, : len(mask)] = mask
    return Corpus(tokens=jnp.asarray(tokens), counts=jnp.asarray(counts))
