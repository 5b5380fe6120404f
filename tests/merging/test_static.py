import jax
import jax.numpy as jnp
import pytest
from jax.tree_util import Partial

from cycleqd_jax.merging.static import Static, check_not_negative


def scale(factor, x):
    return factor * x


def test_equal_parts_make_equal_functions():
    assert Static(scale, 2.0) == Static(scale, 2.0)
    assert hash(Static(scale, 2.0)) == hash(Static(scale, 2.0))
    assert Static(scale, 2.0) != Static(scale, 3.0)
    assert Static(scale, 2.0) != scale


def test_equal_operators_share_a_compilation():
    traces = []

    @jax.jit
    def run(operator, x):
        traces.append(1)
        return operator(x)

    for factor in (2.0, 2.0, 3.0):
        assert run(Partial(Static(scale, factor)), jnp.float32(1.0)) == factor
    assert len(traces) == 2


@pytest.mark.parametrize("value", [-1, -0.5, float("nan")])
def test_negative_numbers_and_nan_are_refused(value):
    with pytest.raises(ValueError, match="strength must not be negative, found"):
        check_not_negative("strength", value)


def test_zero_and_traced_numbers_pass():
    check_not_negative("strength", 0)

    @jax.jit
    def checked(x):
        check_not_negative("strength", x)
        return x

    assert checked(-1.0) == -1.0
