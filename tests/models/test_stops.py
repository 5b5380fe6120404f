from collections.abc import Sequence

import pytest

from cycleqd_jax.models.stops import StopStrings

WORDS = ["", "a", "b", "ab", "abc", "\n", "end"]


def text(tokens: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


@pytest.mark.parametrize(
    ("tokens", "new", "end"),
    [
        ([1, 1, 1], 3, None),
        ([1, 5, 5, 1], 4, 3),
        ([1, 5, 5, 1], 2, 3),
        ([5, 0, 0, 5], 1, 4),
        ([1, 6, 6], 3, 2),
    ],
)
def test_the_token_that_completes_a_string_is_the_last(
    tokens: list[int], new: int, end: int | None
) -> None:
    assert StopStrings(["\n\n", "end"], text).end(tokens, new) == end


def test_a_string_may_begin_and_end_inside_of_tokens() -> None:
    assert StopStrings(["ba"], text).end([3, 4, 1], 3) == 2


def test_the_text_before_the_first_string_remains() -> None:
    stops = StopStrings(["b", "ca"], text)
    assert [stops.cut(t) for t in ("aab", "cab", "aaa", "")] == ["aa", "", "aaa", ""]


def test_no_strings_stop_nothing() -> None:
    stops = StopStrings([], None)
    assert stops.end([1, 2], 2) is None
    assert stops.cut("ab") == "ab"
