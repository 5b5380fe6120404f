import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.expert_svd import draw_expert_gains, expert_svd_mutation
from cycleqd_jax.merging.layout import GainLayout, LeafLayout

LEAVES = (LeafLayout("matrix", (2,), (3, 0, 5)), LeafLayout("vector", (), (1, 1, 1)))
LAYOUT = GainLayout(jax.tree.structure({"m": 0, "v": 0}), LEAVES)


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_only_the_experts_block_of_matrices_is_drawn(expert):
    drawn = draw_expert_gains(jax.random.key(0), LAYOUT, jnp.int32(expert), 0.1)
    inside = LEAVES[0].blocks[expert]
    block = np.asarray(drawn["m"][:, inside])
    assert (block > 0).all()
    assert (block <= 0.1).all()
    assert np.unique(block).size == block.size
    outside = np.delete(np.asarray(drawn["m"]), np.r_[inside], axis=1)
    assert not outside.any()
    assert not np.asarray(drawn["v"]).any()


def test_draws_fill_the_range():
    wide = GainLayout(jax.tree.structure(0), (LeafLayout("matrix", (), (4000,)),))
    drawn = np.asarray(draw_expert_gains(jax.random.key(0), wide, jnp.int32(0), 0.1))
    assert drawn.mean() == pytest.approx(0.05, abs=0.002)
    assert drawn.max() > 0.099
    assert drawn.min() < 0.001


def test_the_mutation_adds_the_draw():
    key, expert = jax.random.key(4), jnp.int32(2)
    child = expert_svd_mutation(LAYOUT, 0.3)(key, LAYOUT.full(1.0), expert)
    drawn = draw_expert_gains(key, LAYOUT, expert, 0.3)
    jax.tree.map(lambda c, d: np.testing.assert_allclose(c, 1.0 + d, rtol=1e-6), child, drawn)


def test_the_strength_may_change_without_a_new_compilation():
    traces = []

    @jax.jit
    def run(mutation, key):
        traces.append(1)
        return mutation(key, LAYOUT.full(1.0), jnp.int32(0))

    for w_max in (0.1, 0.1, 0.2):
        run(expert_svd_mutation(LAYOUT, w_max), jax.random.key(0))
    assert len(traces) == 1


def test_the_strength_may_be_traced():
    @jax.jit
    def run(w_max, key):
        return expert_svd_mutation(LAYOUT, w_max)(key, LAYOUT.full(1.0), jnp.int32(0))

    child = expert_svd_mutation(LAYOUT, 0.3)(jax.random.key(1), LAYOUT.full(1.0), jnp.int32(0))
    np.testing.assert_allclose(run(0.3, jax.random.key(1))["m"], child["m"], rtol=1e-6)


def test_negative_strength_is_refused():
    with pytest.raises(ValueError, match=r"must not be negative, found -0\.1"):
        expert_svd_mutation(LAYOUT, -0.1)


def test_dense_space_needs_arrays():
    with pytest.raises(ValueError, match="needs the basis with its arrays, found a GainLayout"):
        expert_svd_mutation(LAYOUT, space="dense")
