"""The static shape of a spectral genotype: which gains there are and which expert owns each.

Operators that only draw or mask gains need no factor arrays. They are built from a
``GainLayout``, which is hashable, holds no array and therefore never ends up as a constant inside
a compiled function.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.merging.task_vector import Role


@dataclasses.dataclass(frozen=True)
class LeafLayout:
    """Gains of one leaf.

    Attributes:
        role: "matrix" (one gain a singular direction) or "vector" (one gain an expert).
        batch_shape: leading axes of the leaf, the stacked layers.
        ranks: block sizes, one an expert; the gain vector is the blocks one after another. A
            vector leaf has blocks of one.
    """

    role: Role
    batch_shape: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf's gains, ``(..., R)``."""
        return (*self.batch_shape, sum(self.ranks))

    @property
    def owner(self) -> np.ndarray:
        """Expert that owns each gain, shape (R,), int32."""
        return np.repeat(np.arange(len(self.ranks), dtype=np.int32), self.ranks)

    @property
    def position(self) -> np.ndarray:
        """Number of each gain inside its block, shape (R,), int32; 0 is the largest direction."""
        blocks = [np.arange(r, dtype=np.int32) for r in self.ranks]
        return np.concatenate(blocks) if blocks else np.zeros(0, np.int32)

    @property
    def blocks(self) -> tuple[slice, ...]:
        """Slice of each expert's gains."""
        ends = tuple(itertools.accumulate(self.ranks, initial=0))
        return tuple(slice(a, b) for a, b in itertools.pairwise(ends))


@dataclasses.dataclass(frozen=True)
class GainLayout:
    """Gains of a whole model: a tree of ``LeafLayout``, kept flat so that it can be hashed.

    Attributes:
        treedef: structure of the parameters.
        leaves: one ``LeafLayout`` a leaf, in flattening order.
    """

    treedef: Any
    leaves: tuple[LeafLayout, ...]

    @property
    def num_experts(self) -> int:
        """Number of experts in the basis."""
        return len(self.leaves[0].ranks)

    @property
    def size(self) -> int:
        """Number of gains of one genotype."""
        return sum(int(np.prod(leaf.shape)) for leaf in self.leaves)

    def build(self, make: Any) -> Any:
        """Tree of parameters' structure with ``make(i, leaf)`` at leaf number i."""
        return self.treedef.unflatten([make(i, leaf) for i, leaf in enumerate(self.leaves)])

    def zeros(self) -> Any:
        """Gains of the base: all zero, float32."""
        return self.build(lambda _, leaf: jnp.zeros(leaf.shape, jnp.float32))

    def indicator(self, expert: int | jax.Array) -> Any:
        """Gains of one expert: 1 in its blocks, 0 elsewhere; ``expert`` may be traced.

        Raises:
            ValueError: ``expert`` is a Python int outside ``0 .. num_experts - 1``.
        """
        if isinstance(expert, int) and not 0 <= expert < self.num_experts:
            raise ValueError(f"expert must be in 0..{self.num_experts - 1}, found {expert}")
        return self.build(
            lambda _, leaf: jnp.broadcast_to(
                (leaf.owner == jnp.asarray(expert, jnp.int32)).astype(jnp.float32), leaf.shape
            )
        )

    def full(self, value: Any) -> Any:
        """Gains that are all ``value`` (a scalar, may be traced), float32."""
        value = jnp.asarray(value, jnp.float32)
        return self.build(lambda _, leaf: jnp.broadcast_to(value, leaf.shape))
