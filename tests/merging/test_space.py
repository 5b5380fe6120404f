import jax
import numpy as np
import pytest

from cycleqd_jax.merging.space import LeafRoles, basis_arrays, leaf_roles, spectral_layout
from cycleqd_jax.merging.spectral import decompose, gain_layout

TAU = {"n": np.ones((2, 3), np.float32), "m": np.eye(3, dtype=np.float32)}
ROLES = {"n": "vector", "m": "matrix"}
BASIS, _ = decompose([TAU], ROLES)


@pytest.mark.parametrize("model", [ROLES, BASIS, gain_layout(BASIS)])
def test_roles_are_found_in_all_three(model):
    assert leaf_roles(model) == LeafRoles(jax.tree.structure(TAU), ("matrix", "vector"))
    assert hash(leaf_roles(model)) == hash(leaf_roles(ROLES))


def test_map_hands_over_the_role_and_every_leaf():
    names = leaf_roles(ROLES).map(lambda role, x, y: (role, x.shape, y.ndim), TAU, TAU)
    assert names == {"m": ("matrix", (3, 3), 2), "n": ("vector", (2, 3), 2)}


def test_a_task_vector_is_neither():
    with pytest.raises(ValueError, match="expected a tree of MatrixFactors"):
        leaf_roles(TAU)
    with pytest.raises(ValueError, match="space 'spectral' needs a basis or its GainLayout"):
        spectral_layout(ROLES)


def test_basis_arrays_says_what_for():
    assert basis_arrays(BASIS, "a test") is BASIS
    with pytest.raises(ValueError, match="a test needs the basis with its arrays"):
        basis_arrays(gain_layout(BASIS), "a test")
