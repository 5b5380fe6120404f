"""Task vectors: what fine-tuning added to the base, as a tree of float32 arrays.

A *task vector* is ``tau = theta - theta_0`` (Ilharco et al., arXiv 2212.04089). Everything here
works on any pytree; a tree of roles, never a leaf's name or number of dimensions, says which
leaves are matrices.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

Role = Literal["matrix", "vector"]
ROLES: tuple[Role, ...] = ("matrix", "vector")


def leaf_paths(tree: Any) -> list[str]:
    """Paths of a tree's leaves in flattening order, such as ``layers/q``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") or "." for path, _ in leaves]


def _by_path(tree: Any) -> Mapping[str, Any]:
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def check_same_structure(a: Any, b: Any, name_a: str = "first", name_b: str = "second") -> None:
    """Check that two trees have the same leaves; shapes are not looked at.

    Raises:
        ValueError: a leaf of one tree is missing in the other (named), or the containers differ.
    """
    expected: Any = jax.tree.structure(a)
    found: Any = jax.tree.structure(b)
    if expected == found:
        return
    paths_a, paths_b = _by_path(a), _by_path(b)
    for path in paths_a:
        if path not in paths_b:
            raise ValueError(f"leaf '{path}' of {name_a} is missing in {name_b}")
    for path in paths_b:
        if path not in paths_a:
            raise ValueError(
                f"leaf '{path}' of {name_b} is not expected: {name_a} has no such leaf"
            )
    raise ValueError(
        f"{name_a} and {name_b} have the same leaves in different containers: "
        f"expected {expected}, found {found}"
    )


def check_same_tree(a: Any, b: Any, name_a: str = "first", name_b: str = "second") -> None:
    """Check that two trees have the same leaves and every leaf the same shape.

    Args:
        a: the tree that is expected (arrays or anything with a ``shape``).
        b: the tree that is checked.
        name_a: what to call the first in the error.
        name_b: what to call the second.

    Raises:
        ValueError: names the first leaf that is missing, unexpected or misshapen, with both shapes.
    """
    check_same_structure(a, b, name_a, name_b)
    for path, x, y in zip(leaf_paths(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if tuple(jnp.shape(x)) != tuple(jnp.shape(y)):
            raise ValueError(
                f"leaf '{path}': expected shape {tuple(jnp.shape(x))} as in {name_a}, "
                f"found {tuple(jnp.shape(y))} in {name_b}"
            )


def task_vector(theta: Any, base: Any) -> Any:
    """Task vector ``theta - base`` of a fine-tuned model.

    Args:
        theta: parameters of the expert; leaves of any float dtype.
        base: parameters of the base, same tree and shapes.

    Returns:
        Tree of float32 arrays: bfloat16 weights are subtracted in float32, so nothing is rounded
            again.

    Raises:
        ValueError: the trees differ; the message names the leaf.
    """
    check_same_tree(base, theta, "the base", "the expert")
    return jax.tree.map(
        lambda t, b: jnp.asarray(t, jnp.float32) - jnp.asarray(b, jnp.float32), theta, base
    )


def apply_task_vector(base: Any, tau: Any, scale: Any = 1.0) -> Any:
    """Parameters ``base + scale * tau``, added in float32 and cast back to the base's dtypes.

    Args:
        base: parameters of the base.
        tau: task vector, same tree and shapes.
        scale: scalar (may be traced).

    Raises:
        ValueError: the trees differ; the message names the leaf.
    """
    check_same_tree(base, tau, "the base", "the task vector")
    scale = jnp.asarray(scale, jnp.float32)

    def add(b: Any, t: Any) -> jax.Array:
        b = jnp.asarray(b)
        return (b.astype(jnp.float32) + scale * jnp.asarray(t, jnp.float32)).astype(b.dtype)

    return jax.tree.map(add, base, tau)
