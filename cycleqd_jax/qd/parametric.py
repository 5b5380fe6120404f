"""Operators whose parameters are an argument, so that something else can choose them.

A parametric crossover is ``(values, key, a, b) -> child``, a parametric mutation ``(values, key,
genotype, expert) -> genotype``; their ``parameters`` say what the values mean and where they may
lie. Yours takes a few lines:

    def soup(values, key, a, b):
        return jax.tree.map(lambda x, y: values[0] * x + (1 - values[0]) * y, a, b)

    crossover = parametric(soup, Parameter("share", 0.0, 0.5, 1.0))
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.tree_util import Partial
from jaxtyping import Array, Float

from cycleqd_jax.merging.crossover import linear_crossover
from cycleqd_jax.merging.mutation import Mutation
from cycleqd_jax.qd.emitter import as_pytree


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A number to choose, ``low < start < high``; see `squash`."""

    name: str
    low: float
    start: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.start < self.high:
            raise ValueError(
                f"parameter '{self.name}': expected low < start < high, found {self.low}, "
                f"{self.start} and {self.high}"
            )


class Parametric(struct.PyTreeNode):
    """An operator that takes the values of its parameters, (P,) float32, as its first argument.

    Attributes:
        operator: the function, a pytree that is callable.
        parameters: what the values mean, in order, static.
    """

    operator: Any
    parameters: tuple[Parameter, ...] = struct.field(pytree_node=False)

    def __call__(self, values: Float[Array, " parameters"], *args: Any) -> Any:
        """Apply the operator."""
        return self.operator(values, *args)


def parametric(operator: Callable[..., Any], *parameters: Parameter) -> Parametric:
    """Make an operator of your own parametric.

    Args:
        operator: see the module; a pytree that is callable (``jax.tree_util.Partial``) hands its
            arrays over as arguments of compiled functions.
        parameters: in the order of the values; none, if nothing is to be chosen.
    """
    return Parametric(operator=as_pytree(operator), parameters=parameters)


def parametric_crossover(std: float = 0.1, low: float = -1.0, high: float = 3.0) -> Parametric:
    """Linear crossover; its parameters are the means of the weights, ``w1`` and ``w2``.

    Both start at 1 and stay between ``low`` and ``high``.

    Raises:
        ValueError: ``std`` is negative, or 1 does not lie between ``low`` and ``high``.
    """
    linear_crossover(1.0, std)  # refuses a wrong std
    ends = low, 1.0, high
    return parametric(_LinearMerge(std), Parameter("w1", *ends), Parameter("w2", *ends))


@dataclasses.dataclass(frozen=True)
class _LinearMerge:
    std: float

    def __call__(self, values: jax.Array, key: jax.Array, a: Any, b: Any) -> Any:
        return linear_crossover(values, self.std)(key, a, b)


def parametric_mutation(
    mutation: Mutation, low: float = 0.0, start: float = 0.1, high: float = 0.5
) -> Parametric:
    """Any mutation; its parameter is the strength: ``g + w_max (mutation(g) - g)``.

    Where the mutation adds something in proportion to its strength, that of strength 1
    (``expert_svd_mutation(basis, w_max=1.0)``, ``gaussian_mutation(1.0)``) becomes the one of
    strength ``w_max``, up to rounding. The share is taken in float32, the dtype kept.

    Args:
        mutation: of strength 1.
        low: smallest strength.
        start: strength to start from.
        high: largest strength.

    Raises:
        ValueError: unless ``low < start < high``.
    """
    return parametric(
        Partial(_strengthen, as_pytree(mutation)), Parameter("w_max", low, start, high)
    )


def _strengthen(
    mutation: Any, values: jax.Array, key: jax.Array, genotype: Any, expert: Any
) -> Any:
    def scale(x: jax.Array, y: jax.Array) -> jax.Array:
        step = y.astype(jnp.float32) - x.astype(jnp.float32)
        return (x.astype(jnp.float32) + values[0] * step).astype(x.dtype)

    return jax.tree.map(scale, genotype, mutation(key, genotype, expert))


def squash(
    outputs: Float[Array, "*batch parameters"], parameters: tuple[Parameter, ...]
) -> Float[Array, "*batch parameters"]:
    """Any numbers z as values inside the ranges: ``low + (high - low) sigmoid(z + c)``.

    The constants c are such that 0 becomes ``start``.
    """
    low, start, high = (
        jnp.asarray([getattr(p, end) for p in parameters], jnp.float32)
        for end in ("low", "start", "high")
    )
    share = (start - low) / (high - low)
    return low + (high - low) * jax.nn.sigmoid(outputs + jnp.log(share / (1.0 - share)))
