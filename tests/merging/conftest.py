"""A small family of models, and full-weight references computed by NumPy in float64."""

import dataclasses
from typing import Any

import flax.struct
import jax
import numpy as np
import pytest

LAYERS = 3


class Params(flax.struct.PyTreeNode):
    """Stacked wide and tall matrices, an unstacked one, stacked and plain vectors, nested."""

    embed: Any
    layers: Any
    norm: Any


SHAPES = Params(
    embed=(20, 12),
    layers={"up": (LAYERS, 12, 18), "down": (LAYERS, 18, 12), "scale": (LAYERS, 12)},
    norm=(12,),
)
ROLES = Params(
    embed="matrix", layers={"up": "matrix", "down": "matrix", "scale": "vector"}, norm="vector"
)


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def random_params(seed: int, scale: float = 1.0) -> Params:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.asarray(scale * rng.normal(size=shape), np.float32),
        SHAPES,
        is_leaf=is_shape,
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """A base and three experts with full-rank differences."""

    base: Params
    experts: tuple[Params, ...]
    roles: Params

    @property
    def task_vectors(self) -> list[Params]:
        return [jax.tree.map(np.subtract, expert, self.base) for expert in self.experts]


@pytest.fixture(scope="session")
def family() -> Family:
    base = random_params(0, 0.1)
    experts = tuple(jax.tree.map(np.add, base, random_params(1 + e, 0.02)) for e in range(3))
    return Family(base, experts, ROLES)


@pytest.fixture(autouse=True)
def strict_promotion() -> Any:
    """Mixed dtypes and ranks must be converted on purpose."""
    with jax.numpy_dtype_promotion("strict"):
        yield
