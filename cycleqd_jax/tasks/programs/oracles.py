"""When a result is right: EvalPlus's rules, on plain values outside the sandbox.

Restated from `unsafe_execute` and `_special_oracle` of evalplus 0.3.1 (Apache-2.0): equality, a
tolerance for floats, and the problems where another answer is right as well.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

Family = Literal["mbpp", "humaneval"]

_FLOAT_TOLERANCE = 1e-6
_RELATIVE_TOLERANCE = 1e-7
# The order of the result is free, and so is repetition.
_AS_SETS = frozenset(
    ["similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum",
     "intersection_array", "find_dissimilar", "Diff"]
)  # fmt: skip
# A match object is as good as any other value that is not None.
_NOT_NONE = frozenset(["check_str", "text_match_three", "text_starta_endb"])
# What the values of untrusted programs can raise when they are compared.
_UNCOMPARABLE = (TypeError, ValueError, ArithmeticError, RecursionError)


def first_wrong(
    family: Family,
    function: str,
    tolerance: float,
    calls: Sequence[tuple[Any, ...]],
    expected: Sequence[Any],
    found: Iterable[Any],
) -> int | None:
    """Index of the first result that is not right, None when all are.

    Args:
        family: which benchmark's special rules.
        function: name of the judged function; EvalPlus keys its special rules by it.
        tolerance: the problem's absolute one; 0 means exact, but for floats.
        calls: arguments of each call.
        expected: the reference solution's results.
        found: the judged program's, taken one by one up to the first that is wrong; fewer than
            expected are wrong from there on.
    """
    judged = _judge(family, function, tolerance, calls, expected, iter(found))
    return next((index for index, right in enumerate(judged) if not right), None)


def _judge(
    family: Family,
    function: str,
    tolerance: float,
    calls: Sequence[tuple[Any, ...]],
    expected: Sequence[Any],
    found: Iterator[Any],
) -> Iterator[bool]:
    for arguments, want in zip(calls, expected, strict=True):
        try:
            got = next(found)
        except StopIteration:
            yield False
            return
        try:
            if family == "humaneval" and function == "find_zero":
                yield abs(polynomial(arguments[0], got)) <= tolerance
                continue
            exact = _exact(family, function, tolerance, arguments, want, got)
            # As published, the first float of a problem makes all later results approximate.
            if tolerance == 0 and _is_floats(want):
                tolerance = _FLOAT_TOLERANCE
            yield exact or (tolerance != 0 and _close(want, got, tolerance))
        except _UNCOMPARABLE:
            yield False


def _exact(
    family: Family,
    function: str,
    tolerance: float,
    arguments: tuple[Any, ...],
    want: Any,
    got: Any,
) -> bool:
    if family == "mbpp":
        if function == "are_equivalent":  # Mbpp/164: the reference is wrong
            return True
        if function == "sum_div":  # Mbpp/295
            return got in (want, 0)
        if function == "surface_Area":  # Mbpp/581: "height" is ambiguous
            return got == want or abs(got - surface_area(*arguments)) <= tolerance
        if function == "digit_distance_nums":  # Mbpp/558
            return got in (want, digit_distance(*arguments))
        if function in _AS_SETS:
            return set(got) == set(want)
        if function in _NOT_NONE:
            some = want is not None
            return got == some if isinstance(got, bool) else some == (got is not None)
    return bool(got == want)


def _is_floats(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def _close(want: Any, got: Any, tolerance: float) -> bool:
    if type(want) is not type(got):
        return False
    if isinstance(want, list | tuple) and len(want) != len(got):
        return False
    with np.errstate(all="ignore"):
        return bool(np.allclose(got, want, rtol=_RELATIVE_TOLERANCE, atol=tolerance))


def surface_area(base_edge: float | int, height: float | int) -> int:
    """Of a square pyramid whose height is that of its apex, rounded (Mbpp/581)."""
    slant_height = math.sqrt((base_edge / 2) ** 2 + height**2)
    return round(base_edge**2 + 2 * base_edge * slant_height)


def digit_distance(one: int, other: int) -> int:
    """Sum of the differences of digits in equal places, zeros before the shorter (Mbpp/558)."""
    width = max(len(str(one)), len(str(other)))
    pairs = zip(str(one).zfill(width), str(other).zfill(width), strict=True)
    return sum(abs(int(a) - int(b)) for a, b in pairs)


def polynomial(coefficients: Sequence[float | int], x: Any) -> float | int:
    """Value at x, the constant first (HumanEval/32)."""
    return sum(c * math.pow(x, power) for power, c in enumerate(coefficients))
