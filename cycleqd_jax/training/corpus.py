"""Token rows to train on, made once on the host and kept on the device."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np


class Corpus(flax.struct.PyTreeNode):
    """Rows of tokens.

    Attributes:
        tokens: (rows, time) int32.
        counts: (rows, time) bool, True where the token is a target of the loss.
    """

    tokens: Any
    counts: Any


def bucket_rows(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int, *, unit: int = 16
) -> list[Corpus]:
    """Put one text in each row, texts of similar length together, padded on the right.

    One text a row rather than packed: a small model learns to copy from its prompt several times
    sooner when no other text of the same form stands before it. Buckets keep the padding small.

    Args:
        rows: pairs of token ids and a mask of the same length, true where a token is a target.
        pad: the padding token; never a target.
        unit: lengths of the buckets are multiples of this.

    Returns:
        One corpus a bucket, shortest first. A bucket with less than a tenth of the rows joins the
        next longer one.

    Raises:
        ValueError: no rows, or a mask of another length than its tokens.
    """
    if not rows:
        raise ValueError("expected at least one row to train on, found none")
    for number, (tokens, mask) in enumerate(rows):
        if len(tokens) != len(mask):
            raise ValueError(
                f"row {number}: expected a mask of {len(tokens)} entries, found {len(mask)}"
            )
    ordered = sorted(rows, key=lambda row: len(row[0]))
    lengths = [max(1, -(-len(tokens) // unit)) * unit for tokens, _ in ordered]
    corpora, start = [], 0
    for stop in range(1, len(ordered) + 1):
        last = stop == len(ordered)
        if last or (lengths[stop] > lengths[stop - 1] and 10 * (stop - start) >= len(ordered)):
            corpora.append(_pad(ordered[start:stop], lengths[stop - 1], pad))
            start = stop
    return corpora


def _pad(rows: Sequence[tuple[Sequence[int], Sequence[int]]], length: int, pad: int) -> Corpus:
    tokens = np.full((len(rows), length), pad, np.int32)
    counts = np.zeros((len(rows), length), bool)
    for number, (ids, mask) in enumerate(rows):
        tokens[number, : len(ids)] = ids
        counts[number, : len(mask)] = mask
    return Corpus(tokens=jnp.asarray(tokens), counts=jnp.asarray(counts))
