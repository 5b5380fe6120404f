import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.layout import GainLayout, LeafLayout
from cycleqd_jax.merging.mutation import (
    draw_expert_gains,
    expert_svd_mutation,
    gain_scaling_mutation,
    gaussian_mutation,
    no_mutation,
)

LEAVES = (LeafLayout("matrix", (2,), (3, 0, 5)), LeafLayout("vector", (), (1, 1, 1)))
LAYOUT = GainLayout(jax.tree.structure({"m": 0, "v": 0}), LEAVES)


def ones():
    return LAYOUT.full(1.0)


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


def test_expert_mutation_adds_the_draw():
    key, expert = jax.random.key(4), jnp.int32(2)
    child = expert_svd_mutation(LAYOUT, 0.3)(key, ones(), expert)
    drawn = draw_expert_gains(key, LAYOUT, expert, 0.3)
    jax.tree.map(lambda c, d: np.testing.assert_allclose(c, 1.0 + d, rtol=1e-6), child, drawn)


def test_gain_scaling_leaves_vectors_and_the_sign_alone():
    child = gain_scaling_mutation(LAYOUT, 2.0)(jax.random.key(0), ones(), jnp.int32(0))
    assert ((np.asarray(child["m"]) >= 0) & (np.asarray(child["m"]) <= 2)).all()
    assert np.unique(child["m"]).size == child["m"].size
    np.testing.assert_array_equal(child["v"], [1.0, 1.0, 1.0])


def test_gaussian_has_the_asked_for_spread_on_every_leaf():
    zeros = {"a": jnp.zeros((50, 80)), "b": jnp.zeros(4000)}
    out = gaussian_mutation(0.5)(jax.random.key(0), zeros, jnp.int32(0))
    for leaf in jax.tree.leaves(out):
        assert np.std(leaf) == pytest.approx(0.5, rel=0.05)
    assert not np.array_equal(np.ravel(out["a"]), out["b"])


def test_no_mutation_returns_the_genotype():
    jax.tree.map(np.testing.assert_array_equal, no_mutation()(jax.random.key(0), ones(), 0), ones())


def test_equal_operators_share_a_compilation():
    traces = []

    @jax.jit
    def run(mutation, key):
        traces.append(1)
        return mutation(key, ones(), jnp.int32(0))

    for w_max in (0.1, 0.1, 0.1):
        run(expert_svd_mutation(LAYOUT, w_max), jax.random.key(0))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "build",
    [
        lambda: expert_svd_mutation(LAYOUT, -0.1),
        lambda: gain_scaling_mutation(LAYOUT, -0.1),
        lambda: gaussian_mutation(-0.1),
    ],
)
def test_negative_strength_is_refused(build):
    with pytest.raises(ValueError, match=r"must not be negative, found -0\.1"):
        build()


def test_dense_space_needs_arrays():
    with pytest.raises(ValueError, match="found a GainLayout"):
        expert_svd_mutation(LAYOUT, space="dense")


def test_unknown_space_is_refused():
    # The annotation check of the test suite may catch it first; its error is a ValueError's rival.
    with pytest.raises((ValueError, TypeError), match="latent"):
        expert_svd_mutation(LAYOUT, space="latent")  # type: ignore[arg-type]
