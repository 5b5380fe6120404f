"""The mesh of devices, and where on it every array of a model lies.

The mesh has two axes. Rows of a batch, and so candidates, are split over ``population``; weights
over ``model``, as in Megatron-LM (Shoeybi et al., 2019, arXiv 1909.08053): queries, keys, values,
gate and up by their outputs, the output projections by their inputs, embeddings by the vocabulary.
A decoding step then needs sums of activations over ``model`` and nothing else, and building
``W(g) = W_0 + U diag(g) V^T`` needs no communication: a device holds the rows of U and of V that
its part of W is made from.

Which axis of which leaf is which is written in the leaf table (`models.specs`); here is only the
rule that maps its names to the mesh.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cycleqd_jax.merging.spectral import MatrixFactors, VectorFactors
from cycleqd_jax.models.cache import KVCache
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.kernels import CandidateVector, SpectralKernel, StackedKernel
from cycleqd_jax.models.programs import Placement
from cycleqd_jax.models.specs import LeafSpec, LlamaParams, leaf_paths, leaf_table

POPULATION, MODEL = "population", "model"

RULES: Mapping[str, str | None] = {
    "vocab": MODEL,
    "heads": MODEL,
    "kv_heads": MODEL,
    "mlp": MODEL,
    "embed": None,
}
"""Logical axis of the leaf table -> axis of the mesh, None where every device holds all of it."""

AnyMesh = Mesh | AbstractMesh


def mesh_shape(text: str) -> tuple[int, int]:
    """Sizes of ``population`` and ``model`` from a text such as "4x2".

    Raises:
        ValueError: it is not two positive numbers with an x between them.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"expected a mesh as POPULATIONxMODEL, such as 8x1 or 4x2, found {text!r}")
    return int(parts[0]), int(parts[1])


def make_mesh(shape: str | tuple[int, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes ``population`` and ``model``, neighbours along ``model``.

    Args:
        shape: sizes of both axes, or a text such as "4x2".
        devices: all devices of all processes by default.

    Raises:
        ValueError: the mesh has another size than there are devices.
    """
    sizes = mesh_shape(shape) if isinstance(shape, str) else shape
    devices = jax.devices() if devices is None else devices
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"a mesh of {sizes[0]}x{sizes[1]} (population x model) needs {np.prod(sizes)} devices, "
            f"found {len(devices)} ({devices[0].device_kind})"
        )
    # The compiler, not the types of arrays, decides where intermediate results lie.
    kinds = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(sizes, (POPULATION, MODEL), axis_types=kinds, devices=devices)


def local_mesh(shape: tuple[int, int]) -> Mesh | None:
    """The mesh of this process's devices; None is its only device, where nothing is to be placed.

    Raises:
        ValueError: the mesh has another size than this process has devices.
    """
    mesh = make_mesh(shape, jax.local_devices())
    return None if mesh.size == 1 else mesh


def abstract_mesh(shape: tuple[int, int]) -> AbstractMesh:
    """The mesh of devices that need not be here, for plans."""
    kinds = (AxisType.Auto, AxisType.Auto)
    return AbstractMesh(shape, (POPULATION, MODEL), axis_types=kinds)


def check_model(config: LlamaConfig, mesh: AnyMesh) -> None:
    """Refuse a mesh whose ``model`` axis does not divide the model.

    Attention heads stay whole, so head counts have to be divided and not only the widths.

    Raises:
        ValueError: it names the leaf, its axis, both sizes and the sizes that would do.
    """
    size = mesh.shape[MODEL]
    wholes = _wholes(config)
    for path, spec in leaf_paths(config):
        for axis in spec.axes:
            if RULES[axis] == MODEL and wholes[axis] % size:
                common = int(np.gcd.reduce([n for a, n in wholes.items() if RULES[a] == MODEL]))
                allowed = [n for n in range(1, common + 1) if common % n == 0]
                raise ValueError(
                    f"the mesh does not divide the model: leaf {path} has {wholes[axis]} "
                    f"{_UNITS[axis]} along its axis '{axis}', which the mesh's axis '{MODEL}' of "
                    f"{size} does not divide; choose a '{MODEL}' axis of "
                    f"{', '.join(map(str, allowed))} and give the other devices to '{POPULATION}'"
                )


def check_rows(count: int, mesh: AnyMesh, what: str = "rows") -> None:
    """Refuse a batch that ``population`` does not divide.

    Raises:
        ValueError: with the next size that would do.
    """
    size = mesh.shape[POPULATION]
    if count % size:
        raise ValueError(
            f"the mesh does not divide the batch: {count} {what} cannot be split evenly over the "
            f"axis '{POPULATION}' of {size}; use {-(-count // size) * size}"
        )


def weight_sharding(config: LlamaConfig, mesh: AnyMesh, like: LlamaParams | None = None) -> Any:
    """Where the weights lie, or what stands in their place.

    Args:
        config: the model.
        mesh: devices, or an abstract mesh.
        like: a tree of arrays, of factors (a spectral basis) or of kernels (`kernels.attach`),
            layers stacked or unstacked; only its structure is read. None means plain weights.

    Returns:
        A tree of the structure of ``like`` with a ``NamedSharding`` for every array.

    Raises:
        ValueError: the mesh does not divide the model, or ``like`` holds something unknown.
    """
    check_model(config, mesh)
    table = leaf_table(config)
    if like is None:
        return jax.tree.map(lambda spec: _of_node(spec, None, mesh, int(spec.stacked)), table)
    unstacked = isinstance(like.layers, tuple)
    if unstacked:
        table = table.replace(layers=(table.layers,) * len(like.layers))
    return jax.tree.map(
        lambda spec, node: _of_node(spec, node, mesh, int(spec.stacked and not unstacked)),
        table,
        like,
    )


def cache_sharding(config: LlamaConfig, mesh: AnyMesh) -> KVCache:
    """Where a key-value cache lies: rows over ``population``, key heads over ``model``."""
    heads = NamedSharding(mesh, PartitionSpec(POPULATION, RULES["kv_heads"]))
    layers = (heads,) * config.num_layers
    return KVCache(keys=layers, values=layers, positions=row_sharding(mesh))


def batch_placement(config: LlamaConfig, mesh: AnyMesh) -> Placement:
    """What a `Decoder` needs to split its batches over ``population``."""
    heads = cache_sharding(config, mesh).keys[0]
    return Placement(rows=row_sharding(mesh), heads=heads, parts=mesh.shape[POPULATION])


def row_sharding(mesh: AnyMesh) -> NamedSharding:
    """Arrays with one entry a row or a candidate in front: tokens, lengths, bred gains."""
    return NamedSharding(mesh, PartitionSpec(POPULATION))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Arrays that every device holds: archives, scores, the gains that rows look up."""
    return NamedSharding(mesh, PartitionSpec())


_UNITS = {"vocab": "tokens", "heads": "query heads", "kv_heads": "key heads", "mlp": "columns"}


def _wholes(config: LlamaConfig) -> dict[str, int]:
    """How many parts an axis has that a device holds wholly or not at all."""
    return {
        "vocab": config.vocab_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "mlp": config.intermediate_size,
        "embed": config.hidden_size,
    }


def _of_node(spec: LeafSpec, node: Any, mesh: AnyMesh, layer_axes: int) -> Any:
    """Shardings of one leaf, or of the arrays that a node in its place holds."""

    def at(*axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*[None] * layer_axes, *axes))

    axes = tuple(RULES[axis] for axis in spec.axes)
    if isinstance(node, MatrixFactors):
        return node.replace(u=at(axes[0], None), v=at(axes[1], None))
    if isinstance(node, SpectralKernel):
        # Rows of any candidate may be anywhere, so every device looks up gains in all of them.
        return SpectralKernel(base=at(*axes), u=at(axes[0], None), v=at(axes[1], None), gain=at())
    if isinstance(node, StackedKernel):
        # Blocks of rows and their candidates' weights are split alike.
        return StackedKernel(values=at(POPULATION, *axes))
    if isinstance(node, VectorFactors):
        return VectorFactors(delta=at(None, *axes))
    if isinstance(node, CandidateVector):
        return CandidateVector(values=at(None, *axes))
    if len(jax.tree.leaves(node)) > 1:
        raise ValueError(
            f"expected an array, factors or a kernel in place of {spec.hf_name}, "
            f"found {type(node).__name__}"
        )
    return at(*axes)
