from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from cycleqd_jax.runs.records.leaves import (
    leaf_index,
    mismatches,
    named_leaves,
    rebuild,
    static_fields,
    to_numpy,
)


class Inner(struct.PyTreeNode):
    x: Any
    act: Any = struct.field(pytree_node=False, default=None)


class Outer(struct.PyTreeNode):
    inner: Any
    parts: Any
    bins: int = struct.field(pytree_node=False, default=3)


def outer(**changes):
    return Outer(
        Inner(jnp.zeros((2, 3)), partial(max, 1)), ({"k": np.array([1], np.int8)}, 2.5), **changes
    )


def index(tree):
    return [leaf_index(n, leaf, to_numpy(leaf, n)) for n, leaf in named_leaves(tree)]


def test_leaves_are_named_by_their_path():
    assert [name for name, _ in named_leaves(outer())] == [
        ".inner.x",
        ".parts[0]['k']",
        ".parts[1]",
    ]
    assert named_leaves(3)[0][0] == "(the whole state)"


def test_static_fields_are_found_at_any_depth_without_addresses():
    found = static_fields({"a": [outer(bins=5), Inner(1, print), Inner(2, lambda: 0)]})
    assert found["['a'][0].bins"] == "5"
    assert "max" in found["['a'][0].inner.act"]
    assert found["['a'][1].act"] == "<built-in function print>"
    assert "0x" not in found["['a'][2].act"]


def test_shapes_may_differ_and_nothing_else():
    template = outer()
    grown = outer().replace(inner=Inner(jnp.zeros((8, 3)), partial(max, 1)))
    assert mismatches(template, index(grown), static_fields(grown)) == []
    other = Outer(Inner(jnp.zeros((2, 3, 1), jnp.bfloat16), partial(max, 1)), ({"j": 1}, 2), bins=4)
    lines = mismatches(template, index(other), static_fields(other))
    assert lines == [
        ".inner.x: expected jax array, float32, 2 axes, found jax array, bfloat16, 3 axes",
        ".parts[0]['k']: expected numpy array, int8, 1 axes, found nothing",
        ".parts[1]: expected python float, float64, 0 axes, found python int, int64, 0 axes",
        ".bins: expected the static value 3, found the static value 4",
        ".parts[0]['j']: expected nothing, found python int, int64, 0 axes",
    ]


def test_rebuild_gives_every_leaf_the_templates_kind():
    template = (jnp.zeros(1), np.zeros(1), np.float32(0), 0, 0.0, True, jax.random.key(0))
    arrays = [to_numpy(leaf, "leaf") for leaf in template[:-1]]
    arrays = [np.asarray(a + 1 if a.dtype != bool else ~a) for a in arrays]
    arrays.append(np.asarray(jax.random.key_data(jax.random.key(7))))
    back = rebuild(template, arrays)
    assert [type(leaf) for leaf in back[1:6]] == [np.ndarray, np.float32, int, float, bool]
    assert isinstance(back[0], jax.Array)
    assert back[3:6] == (1, 1.0, False)
    assert back[6] == jax.random.key(7)


def test_placement_is_the_templates():
    committed = jax.device_put(jnp.zeros(2), jax.devices()[0])
    loose, bound = rebuild((jnp.zeros(2), committed), [np.ones(2, np.float32)] * 2)
    assert not loose.committed
    assert bound.committed


@pytest.mark.parametrize("leaf", ["text", object(), np.array([object()])])
def test_a_leaf_that_is_no_array_is_named(leaf):
    with pytest.raises(ValueError, match=r"\.state: expected an array or a number, found"):
        to_numpy(leaf, ".state")
