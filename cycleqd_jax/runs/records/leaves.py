"""The leaves of a state tree as plain NumPy arrays and back, with what identifies them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves in tree order, each with its path, as ``.repertoire.genotypes['q']``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path) or "(the whole state)", leaf) for path, leaf in leaves]


def is_random_key(leaf: Any) -> bool:
    """Whether the leaf is an array of typed random keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_numpy(leaf: Any, name: str) -> np.ndarray:
    """The leaf's bits on the host; random keys become their uint32 data.

    Raises:
        ValueError: naming the leaf, if it is no array or number, or lies on several hosts in parts.
    """
    if is_random_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array):
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise ValueError(
                f"{name}: expected an array this host holds whole, found {leaf.sharding}"
            )
        return np.asarray(leaf)
    if isinstance(leaf, (np.ndarray, np.generic, bool, int, float)):
        array = np.asarray(leaf)
        if array.dtype != object:
            return array
    raise ValueError(f"{name}: expected an array or a number, found {type(leaf).__name__}")


def leaf_index(name: str, leaf: Any, array: np.ndarray) -> dict[str, Any]:
    """What is written about a leaf: path, kind, and its array's shape and dtype."""
    return {
        "path": name,
        "kind": _kind(leaf),
        "shape": list(array.shape),
        "dtype": array.dtype.name,
    }


def static_fields(tree: Any, path: str = "") -> dict[str, str]:
    """The fields of the tree's dataclasses that are not leaves: path to printed value."""
    found: dict[str, str] = {}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            value, name = getattr(tree, field.name), f"{path}.{field.name}"
            if field.metadata.get("pytree_node", True):
                found |= static_fields(value, name)
            else:
                found[name] = _ADDRESS.sub("", repr(value))  # functions print where they lie
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            found |= static_fields(value, f"{path}[{key!r}]")
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            found |= static_fields(value, f"{path}[{i}]")
    return found


def mismatches(
    template: Any, leaves: Sequence[Mapping[str, Any]], static: Mapping[str, str]
) -> list[str]:
    """What differs between a template and a checkpoint's index, a line each; shapes may differ.

    Compared are the paths of the leaves, their kind, dtype and number of axes, and static fields.
    """
    wanted = {
        name: _describe(_kind(leaf), a.dtype.name, a.ndim)
        for name, leaf in named_leaves(template)
        for a in [to_numpy(leaf, name)]
    } | {name: f"the static value {value}" for name, value in static_fields(template).items()}
    found = {
        str(leaf["path"]): _describe(leaf["kind"], leaf["dtype"], len(leaf["shape"]))
        for leaf in leaves
    } | {name: f"the static value {value}" for name, value in static.items()}
    return [
        f"{name}: expected {wanted.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
        for name in [*wanted, *(found.keys() - wanted.keys())]
        if wanted.get(name) != found.get(name)
    ]


def rebuild(template: Any, arrays: Sequence[np.ndarray]) -> Any:
    """A tree of the template's structure, leaf types and static fields with the arrays' values."""
    leaves, structure = jax.tree.flatten(template)
    return jax.tree.unflatten(structure, [_like(t, a) for t, a in zip(leaves, arrays, strict=True)])


def _like(template: Any, array: np.ndarray) -> Any:
    if is_random_key(template):
        return jax.random.wrap_key_data(jnp.array(array), impl=jax.random.key_impl(template))
    if isinstance(template, jax.Array):
        # Uncommitted stays uncommitted: jit would otherwise compile once more after a resume.
        return jax.device_put(array, template.sharding) if template.committed else jnp.array(array)
    if isinstance(template, np.ndarray):
        return np.array(array)
    if isinstance(template, np.generic):
        return array[()]
    return type(template)(array.item())


def _kind(leaf: Any) -> str:
    if is_random_key(leaf):
        return f"random key {jax.random.key_impl(leaf)}"
    if isinstance(leaf, jax.Array):
        return "jax array"
    if isinstance(leaf, (np.ndarray, np.generic)):
        return "numpy array"
    return f"python {type(leaf).__name__}"


def _describe(kind: str, dtype: str, axes: int) -> str:
    return f"{kind}, {dtype}, {axes} axes"
