import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.qd.schedule import cycle_every, cycle_per_child, cycle_per_generation

SCHEDULES = [cycle_per_generation, cycle_per_child, cycle_every(4)]


def run(schedule, generations, batch, archives):
    rows = [schedule(jnp.int32(t), batch, archives) for t in range(generations)]
    return np.concatenate([np.asarray(r) for r in rows])


def test_per_generation():
    np.testing.assert_array_equal(run(cycle_per_generation, 4, 2, 3), [0, 0, 1, 1, 2, 2, 0, 0])


def test_per_child_goes_on_where_the_last_generation_stopped():
    np.testing.assert_array_equal(run(cycle_per_child, 3, 4, 3), np.arange(12) % 3)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_every_n_children(n):
    np.testing.assert_array_equal(run(cycle_every(n), 20, 3, 4), np.arange(60) // n % 4)


def test_late_generations_do_not_overflow():
    late = 2_000_000_011
    found = cycle_every(3)(jnp.int32(late), 640, 5)
    expected = (late * 640 + np.arange(640, dtype=np.int64)) // 3 % 5
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shape_dtype_and_jit(schedule):
    found = jax.jit(schedule, static_argnums=(1, 2))(jnp.int32(3), 5, 3)
    assert found.shape == (5,)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, schedule(jnp.int32(3), 5, 3))


def test_equal_schedules_are_equal():
    assert cycle_every(3) == cycle_every(3)


def test_a_period_of_zero_is_refused():
    with pytest.raises(ValueError, match="at least 1 child, found 0"):
        cycle_every(0)
