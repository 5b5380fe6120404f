"""The two genotype spaces, and the part of a leaf that one layer owns in the dense one."""

import dataclasses
from typing import Any, Literal

import jax

from cycleqd_jax.merging.layout import GainLayout
from cycleqd_jax.merging.spectral import SpectralBasis, gain_layout
from cycleqd_jax.merging.task_vector import ROLES, Role, leaf_paths

Space = Literal["spectral", "dense"]
"""What a genotype is: "spectral" (gains over a basis) or "dense" (a task vector)."""

LAYER_AXES: dict[Role, tuple[int, ...]] = {"matrix": (-2, -1), "vector": (-1,)}
"""Axes of a dense leaf that belong to one layer; the axes before them are stacked layers."""


@dataclasses.dataclass(frozen=True)
class LeafRoles:
    """Roles of a model's leaves, kept flat so that they can be hashed.

    Attributes:
        treedef: structure of the parameters.
        roles: "matrix" or "vector" for each leaf, in flattening order.
    """

    treedef: Any
    roles: tuple[Role, ...]

    def map(self, function: Any, *trees: Any) -> Any:
        """Tree of ``function(role, *leaves)`` over trees of the parameters' structure."""
        columns = [self.treedef.flatten_up_to(tree) for tree in trees]
        rows = zip(self.roles, *columns, strict=True)
        return self.treedef.unflatten([function(*row) for row in rows])


def leaf_roles(model: Any) -> LeafRoles:
    """Roles of a model's leaves.

    Args:
        model: a tree of "matrix" | "vector", or a spectral basis or its ``GainLayout``, which know
            them.

    Raises:
        ValueError: an unknown role (the leaf is named), or none of the three.
    """
    if not isinstance(model, GainLayout):
        leaves = jax.tree.leaves(model)
        if leaves and all(isinstance(leaf, str) for leaf in leaves):
            for path, role in zip(leaf_paths(model), leaves, strict=True):
                if role not in ROLES:
                    raise ValueError(
                        f"leaf '{path}': expected a role out of {ROLES}, found {role!r}"
                    )
            return LeafRoles(jax.tree.structure(model), tuple(leaves))
    layout = gain_layout(model)
    return LeafRoles(layout.treedef, tuple(leaf.role for leaf in layout.leaves))


def check_space(space: str) -> None:
    """Refuse what is not a `Space`.

    Raises:
        ValueError: neither "spectral" nor "dense".
    """
    if space not in ("spectral", "dense"):
        raise ValueError(f"space must be 'spectral' or 'dense', found {space!r}")


def spectral_layout(model: Any) -> GainLayout:
    """Layout for an operator in the spectral space.

    Raises:
        ValueError: neither a basis nor a ``GainLayout``.
    """
    try:
        return gain_layout(model)
    except ValueError as error:
        raise ValueError(f"space 'spectral' needs a basis or its GainLayout: {error}") from error


def basis_arrays(model: Any, purpose: str) -> SpectralBasis:
    """Check that a basis comes with its arrays, not as a bare layout or as roles.

    Raises:
        ValueError: a ``GainLayout``, or no basis; the message says what the arrays are for.
    """
    if isinstance(model, GainLayout):
        raise ValueError(f"{purpose} needs the basis with its arrays, found a GainLayout")
    gain_layout(model)
    return model
