"""Buckets of rows: nothing lost, nothing added, padding that never counts."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cycleqd_jax.training.corpus import Corpus, bucket_rows

PAD = 99
Rows = Sequence[tuple[Sequence[int], Sequence[int]]]

ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 1)), min_size=1, max_size=40).map(
        lambda pairs: ([token for token, _ in pairs], [mask for _, mask in pairs])
    ),
    min_size=1,
    max_size=30,
)


def row(length: int, token: int = 1) -> tuple[list[int], list[int]]:
    return [token] * length, [1] * length


def unpadded(corpora: Sequence[Corpus]) -> list[tuple[list[int], list[int]]]:
    """All rows as they went in; tokens below PAD are text."""
    found = []
    for corpus in corpora:
        for tokens, counts in zip(
            np.asarray(corpus.tokens), np.asarray(corpus.counts), strict=True
        ):
            length = int((tokens != PAD).sum())
            assert (tokens[length:] == PAD).all(), "padding is on the right only"
            assert not counts[length:].any(), "padding never counts"
            found.append((tokens[:length].tolist(), counts[:length].astype(int).tolist()))
    return found


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, unit=st.sampled_from([1, 4, 16]))
def test_every_row_is_in_exactly_one_bucket(rows: Rows, unit: int) -> None:
    corpora = bucket_rows(rows, PAD, unit=unit)
    assert sorted(unpadded(corpora)) == sorted((list(ids), list(mask)) for ids, mask in rows)


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, unit=st.sampled_from([1, 4, 16]))
def test_buckets_are_tight_ordered_and_not_too_small(rows: Rows, unit: int) -> None:
    corpora = bucket_rows(rows, PAD, unit=unit)
    shapes = [corpus.tokens.shape for corpus in corpora]
    assert [length for _, length in shapes] == sorted({length for _, length in shapes})
    for corpus, (_, length) in zip(corpora, shapes, strict=True):
        longest = int((np.asarray(corpus.tokens) != PAD).sum(axis=1).max())
        assert length == -(-longest // unit) * unit
        assert corpus.tokens.dtype == np.int32
        assert corpus.counts.dtype == bool
        assert corpus.counts.shape == corpus.tokens.shape
    # The longest texts have no longer bucket to join.
    assert all(10 * size >= len(rows) for size, _ in shapes[:-1])


def test_rows_keep_their_values_and_masks() -> None:
    (corpus,) = bucket_rows([([5, 6, 7], [0, 1, 1]), ([8], [1])], PAD, unit=4)
    np.testing.assert_array_equal(corpus.tokens, [[8, PAD, PAD, PAD], [5, 6, 7, PAD]])
    np.testing.assert_array_equal(corpus.counts, [[1, 0, 0, 0], [0, 1, 1, 0]])


def test_lengths_part_rows_into_buckets() -> None:
    rows = [row(3)] * 4 + [row(16)] * 4 + [row(17)] * 4 + [row(40)] * 4
    shapes = [corpus.tokens.shape for corpus in bucket_rows(rows, PAD)]
    assert shapes == [(8, 16), (4, 32), (4, 48)]


def test_a_small_bucket_joins_the_next_longer_one() -> None:
    few, many = [row(3)] * 2, [row(30)] * 30
    assert [c.tokens.shape for c in bucket_rows(few + many, PAD)] == [(32, 32)]
    assert [c.tokens.shape for c in bucket_rows(few * 2 + many, PAD)] == [(4, 16), (30, 32)]


def test_the_padding_token_counts_where_the_text_itself_holds_it() -> None:
    (corpus,) = bucket_rows([([1, PAD, 2], [1, 1, 1])], PAD, unit=4)
    np.testing.assert_array_equal(corpus.counts, [[True, True, True, False]])


def test_an_empty_text_is_a_row_of_padding() -> None:
    (corpus,) = bucket_rows([([], [])], PAD, unit=4)
    np.testing.assert_array_equal(corpus.tokens, [[PAD] * 4])
    assert not corpus.counts.any()


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one row to train on, found none"):
        bucket_rows([], PAD)


@pytest.mark.parametrize("mask", [[1], [1, 1, 1]])
def test_a_mask_of_another_length_is_an_error(mask: list[int]) -> None:
    message = f"row 1: expected a mask of 2 entries, found {len(mask)}"
    with pytest.raises(ValueError, match=message):
        bucket_rows([row(3), ([4, 5], mask)], PAD)
