"""Static arguments of operators that are pytrees."""

from collections.abc import Callable
from typing import Any


class Static:
    """A function with hashable leading arguments, equal to another one with equal arguments.

    ``functools.partial`` compares by identity, so an operator that is built twice would compile
    twice. Inside a ``jax.tree_util.Partial`` the leading arguments given here are static and the
    Partial's own arguments are traced.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._parts = (function, args)

    def __call__(self, *args: Any) -> Any:
        """Call the function with the leading arguments first."""
        function, leading = self._parts
        return function(*leading, *args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)


def check_not_negative(name: str, value: Any) -> None:
    """Refuse a negative number; a traced one cannot be looked at and passes.

    Raises:
        ValueError: a Python number below zero, or not a number.
    """
    if isinstance(value, int | float) and not value >= 0:
        raise ValueError(f"{name} must not be negative, found {value}")
