"""Base and experts of a run in their folders, read a leaf at a time: no two models are in memory.

What relates the experts to the base, decomposition and comparison, goes leaf by leaf.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from cycleqd_jax.merging.low_rank import is_low_rank
from cycleqd_jax.merging.task_vector import leaf_paths
from cycleqd_jax.models.convert import load_config, open_model
from cycleqd_jax.models.lora import is_adapter, load_adapter
from cycleqd_jax.models.specs import roles
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.sharding import weight_sharding

Reader = Callable[[], Any]
"""Reads a leaf from its file to its devices."""


@dataclass(frozen=True)
class StoredLeaf:
    """One leaf of base and experts.

    Attributes:
        path: such as ``layers/q``.
        role: "matrix" or "vector".
        base: reads the base's weights.
        experts: one an expert; reads its weights, of an adapter the change: a `LowRank` of a
            matrix, an array of a vector.
        adapters: whether each expert is an adapter.
    """

    path: str
    role: str
    base: Reader
    experts: tuple[Reader, ...]
    adapters: tuple[bool, ...]


class StoredFamily:
    """The folders of a run's models, all checked but for the weights' values.

    Args:
        config: says where they are.
        mesh: the devices that leaves are read to; None is one device.

    Attributes:
        architecture: of base and experts.
        mesh: as given.
        sharding: where the leaves of a model go; None is the default device.

    Raises:
        ValueError: a folder that is no model, or a mesh that does not divide it.
    """

    def __init__(self, config: RunConfig, mesh: Mesh | None = None) -> None:
        self.mesh = mesh
        declared = load_config(config.base)
        self.sharding = None if mesh is None else weight_sharding(declared, mesh)
        self.architecture, base = open_model(config.base, sharding=self.sharding)
        folders = [Path(folder) for folder in config.experts.values()]
        self._adapters = tuple(map(is_adapter, folders))
        self._readers = [jax.tree.leaves(base), *map(self._readers_of, folders)]

    def leaves(self) -> Iterator[StoredLeaf]:
        """Every leaf, in the order of the parameters; nothing is read yet."""
        policy = roles(self.architecture)
        for path, role, base, *experts in zip(
            leaf_paths(policy), jax.tree.leaves(policy), *self._readers, strict=True
        ):
            yield StoredLeaf(path, role, base, tuple(experts), self._adapters)

    def _readers_of(self, folder: Path) -> list[Reader]:
        if not is_adapter(folder):
            return jax.tree.leaves(open_model(folder, sharding=self.sharding)[1])
        # Thin: an adapter is read whole, and stays on the host.
        update = load_adapter(folder, self.architecture)
        return [partial(_same, leaf) for leaf in jax.tree.leaves(update, is_leaf=is_low_rank)]


def _same(leaf: Any) -> Any:
    return leaf
