"""When a result is right; published cases of every rule."""

from typing import Any

import pytest

from cycleqd_jax.tasks.programs.oracles import first_wrong
from cycleqd_jax.tasks.programs.runner import Digest, Opaque

NAN = float("nan")


def right(want: Any, got: Any, *, function: str = "f", tolerance: float = 0.0,
          family: Any = "mbpp", arguments: tuple[Any, ...] = ()) -> bool:  # fmt: skip
    return first_wrong(family, function, tolerance, [arguments], [want], [got]) is None


@pytest.mark.parametrize(
    ("want", "got", "expected"),
    [
        (1, 1, True),
        (1, True, True),
        (1, 1.0, True),
        (1, "1", False),
        ([1], (1,), False),
        ((1, 2), (1, 2), True),
        ({1, 2}, frozenset([2, 1]), True),
        ({"a": 1}, {"a": 1}, True),
        (None, None, True),
        (0.3, 0.1 + 0.2, True),
        (0.3, 0.3001, False),
        (1.0, 1, True),
        (1.5, True, False),
        ([0.3], [0.1 + 0.2], True),
        ([0.3], (0.1 + 0.2,), False),
        ([0.3, 1.0], [0.3], False),
        ([0.3, 1], [0.1 + 0.2, 1], False),
        ([], [], True),
        (NAN, NAN, False),
        (float("inf"), float("inf"), True),
        (float("inf"), -float("inf"), False),
        (1j, 1j, True),
        (Digest("list", "ab"), Digest("list", "ab"), True),
        (Digest("list", "ab"), Digest("list", "ac"), False),
        (Digest("list", "ab"), "ab", False),
        (1.0, Opaque("float", True), False),
        (1.0, 10**400, False),
    ],
)
def test_equality_and_the_tolerance_of_floats(want: Any, got: Any, expected: bool) -> None:
    assert right(want, got) is expected


def test_a_problem_may_have_its_own_tolerance() -> None:
    assert right(1.0, 1.00009, tolerance=1e-4)
    assert right([[1.0]], [[1.00009]], tolerance=1e-4)
    assert not right(1.0, 1.001, tolerance=1e-4)
    assert not right(1, 1.00009, tolerance=1e-4)
    assert not right(["a"], ["b"], tolerance=1e-4)
    assert not right({"a": 1.0}, {"a": 1.00001}, tolerance=1e-4)


def test_the_first_float_makes_what_follows_approximate() -> None:
    # As published: the integers after it are compared as numbers.
    assert first_wrong("mbpp", "f", 0.0, [(), ()], [0.5, [10**9]], [0.5, [10**9 + 1]]) is None
    assert first_wrong("mbpp", "f", 0.0, [(), ()], [[10**9], 0.5], [[10**9 + 1], 0.5]) == 0


def test_the_first_wrong_result_is_told_and_later_ones_are_not_looked_at() -> None:
    def results() -> Any:
        yield 1
        yield 3
        raise AssertionError("looked at")

    assert first_wrong("mbpp", "f", 0.0, [()] * 3, [1, 2, 3], results()) == 1
    assert first_wrong("mbpp", "f", 0.0, [()] * 3, [1, 2, 3], [1, 2]) == 2


@pytest.mark.parametrize(
    ("function", "arguments", "want", "got", "expected"),
    [
        ("are_equivalent", (1, 2), True, False, True),
        ("sum_div", (7,), 1, 0, True),
        ("sum_div", (7,), 1, 2, False),
        ("surface_Area", (3, 4), 33, 36, False),
        ("surface_Area", (4, 5), 999, 59, True),
        ("surface_Area", (4, 5), 999, "59", False),
        ("digit_distance_nums", (23, 1), 99, 4, True),
        ("digit_distance_nums", (23, 1), 99, 5, False),
        ("Diff", (), [1, 2], [2, 1, 1], True),
        ("Diff", (), [1, 2], [2], False),
        ("Diff", (), [1, 2], 5, False),
        ("Diff", (), [1, 2], [[1], 2], False),
        ("check_str", (), Opaque("Match", True), "match", True),
        ("check_str", (), Opaque("Match", True), True, True),
        ("check_str", (), Opaque("Match", True), False, False),
        ("check_str", (), Opaque("Match", True), None, False),
        ("check_str", (), None, None, True),
        ("check_str", (), None, "x", False),
    ],
)
def test_special_oracles_of_mbpp(
    function: str, arguments: tuple[Any, ...], want: Any, got: Any, expected: bool
) -> None:
    assert right(want, got, function=function, arguments=arguments) is expected


@pytest.mark.parametrize(
    ("got", "expected"), [(2.00001, True), (2.1, False), (NAN, False), ("2", False), (None, False)]
)
def test_a_root_is_any_root(got: Any, expected: bool) -> None:
    found = right(1.0, got, function="find_zero", family="humaneval", tolerance=1e-4,
                  arguments=([4.0, -4.0, 1.0],))  # fmt: skip
    assert found is expected


def test_special_oracles_are_of_one_benchmark() -> None:
    assert not right([1, 2], [2, 1], function="Diff", family="humaneval")
    assert not right(5.0, 2.0, function="find_zero", arguments=([4.0, -4.0, 1.0],))
