import numpy as np
import pytest

from cycleqd_jax.models.schedule import (
    SlotTable,
    block_bucket,
    bucket,
    prefix_bucket,
    prompt_bucket,
    row_buckets,
    shared_prefixes,
    slot_bucket,
)


@pytest.mark.parametrize("most", [1, 4, 7, 64, 100, 256])
def test_row_buckets_rise_to_the_largest_batch(most: int) -> None:
    sizes = row_buckets(most)
    assert sizes[-1] == most
    assert list(sizes) == sorted(set(sizes))
    assert [bucket(count, sizes) >= count for count in range(1, most + 1)] == [True] * most
    assert bucket(most + 1, sizes) == most


@pytest.mark.parametrize(("parts", "largest"), [(8, 256), (6, 258), (3, 258)])
def test_batches_are_divided_by_the_devices_they_are_split_over(parts: int, largest: int) -> None:
    sizes = row_buckets(256, parts)
    assert all(size % parts == 0 for size in sizes)
    assert sizes[-1] == largest
    assert list(sizes) == sorted(set(sizes))


@pytest.mark.parametrize("round_up", [prompt_bucket, slot_bucket])
def test_buckets_are_few_and_close(round_up: object) -> None:
    assert callable(round_up)
    found = [round_up(length) for length in range(1, 8193)]
    assert all(size >= length for length, size in enumerate(found, 1))
    assert all(size <= 1.25 * length + 32 for length, size in enumerate(found, 1))
    assert len(set(found)) < 35
    assert found == sorted(found)


def test_blocks_have_half_steps_where_prompts_are_short() -> None:
    lengths = (1, 8, 9, 17, 24, 25, 33, 49, 129)
    assert [block_bucket(n) for n in lengths] == [8, 8, 16, 24, 24, 32, 48, 64, 160]
    assert all(n <= block_bucket(n) <= prompt_bucket(n) for n in range(1, 4096))


def test_a_prefix_is_rounded_down() -> None:
    assert [prefix_bucket(n) for n in (0, 31, 32, 63, 64, 255, 257)] == [0, 0, 32, 32, 64, 224, 256]
    assert all(0.75 * n - 32 < prefix_bucket(n) <= n for n in range(4096))


def chats(prefix: list[int], count: int) -> list[list[int]]:
    return [[*prefix, 900 + i, 7] for i in range(count)]


def test_a_common_prefix_is_shared_by_all() -> None:
    prompts = chats([1] * 70, 5)
    assert shared_prefixes(prompts, [0] * 5) == [64] * 5


def test_of_nested_prefixes_the_dearest_are_shared() -> None:
    template = [1] * 40
    first, second = template + [2] * 100, template + [3] * 60
    prompts = chats(first, 4) + chats(second, 4)
    assert shared_prefixes(prompts, [0] * 8) == [128] * 4 + [96] * 4
    # Many short ones and few long ones: now the template alone saves more.
    prompts = [*chats(template, 30), *chats(first, 1)]
    assert shared_prefixes(prompts, [0] * 31) == [32] * 31


def test_what_saves_nothing_is_not_shared() -> None:
    assert shared_prefixes([], []) == []
    assert shared_prefixes(chats([1] * 70, 1), [0]) == [0]
    assert shared_prefixes(chats([1] * 20, 9), [0] * 9) == [0] * 9
    # A row of each candidate: every prefix would be computed for one row.
    assert shared_prefixes(chats([1] * 70, 4), [0, 1, 2, 3]) == [0] * 4


def test_equal_prompts_keep_a_token_of_their_own() -> None:
    assert shared_prefixes([[5] * 64] * 3, [0] * 3) == [32] * 3


def test_slots_are_free_when_no_row_needs_them() -> None:
    table = SlotTable(2, 6)
    table.enter([0], 3)
    assert table.free().tolist() == [3, 4, 5]
    table.used[0, [3, 4]] = True
    table.enter([1], 2)
    assert table.end == 5
    table.used[0] = False
    assert table.free().tolist() == [2, 3, 4, 5]
    table.reshape(np.array([1]), 8)
    assert (table.slots, table.end) == (8, 2)
    table.reshape(np.array([0]), 4)
    assert table.free().tolist() == [2, 3]
