from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from cycleqd_jax.merging.crossover import linear_crossover
from cycleqd_jax.merging.expert_svd import expert_svd_mutation
from cycleqd_jax.merging.layout import GainLayout
from cycleqd_jax.merging.spectral import (
    MatrixFactors,
    VectorFactors,
    compile_materialise,
    decompose,
    expand,
    expert_gains,
    gain_layout,
    materialise,
    uniform_gains,
    zero_gains,
)


@pytest.fixture(scope="module")
def basis(family):
    return decompose(family.task_vectors, family.roles, base=family.base)[0]


def relative_error(tree, reference):
    """Largest relative Frobenius error over the leaves."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    return max(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) for a, b in pairs)


def as_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def merge_full_weights(key, a, b):
    """The normalised sum in float64, with the weights that ``linear_crossover(1, 0.3)`` draws."""
    w = 1.0 + np.float32(0.3) * np.asarray(jax.random.normal(key, (2,), jnp.float32))
    w = w.astype(np.float64) / w.sum(dtype=np.float64)
    return jax.tree.map(lambda x, y: w[0] * x + w[1] * y, a, b)


def mutate_full_weights(tau, expert_tau, gains, layout, expert):
    """``tau + U (S w) V^T`` on full weights, by NumPy's SVD in float64."""
    out = []
    leaves = zip(
        jax.tree.leaves(tau),
        jax.tree.leaves(expert_tau),
        jax.tree.leaves(gains),
        layout.leaves,
        strict=True,
    )
    for value, source, gain, leaf in leaves:
        if leaf.role == "vector":
            out.append(value)
            continue
        u, s, vt = np.linalg.svd(source, full_matrices=False)
        w = np.asarray(gain, np.float64)[..., leaf.blocks[expert]]
        rank = w.shape[-1]
        out.append(value + (u[..., :rank] * (s[..., :rank] * w)[..., None, :]) @ vt[..., :rank, :])
    return jax.tree.unflatten(jax.tree.structure(tau), out)


def test_basis_has_the_parameters_structure(family, basis):
    assert isinstance(basis.embed, MatrixFactors)
    assert isinstance(basis.norm, VectorFactors)
    assert basis.layers["up"].u.shape == (3, 12, 36)
    assert basis.layers["up"].v.shape == (3, 18, 36)
    assert basis.layers["up"].ranks == (12, 12, 12)
    assert basis.layers["scale"].delta.shape == (3, 3, 12)
    assert gain_layout(basis).num_experts == 3


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_an_expert_is_the_indicator_of_its_block(family, basis, expert):
    rebuilt = materialise(family.base, basis, expert_gains(basis, expert))
    assert relative_error(rebuilt, as_float64(family.experts[expert])) < 1e-6


def test_the_base_is_zero(family, basis):
    rebuilt = materialise(family.base, basis, zero_gains(basis))
    jax.tree.map(np.testing.assert_array_equal, rebuilt, family.base)


def test_uniform_gains_are_task_arithmetic(family, basis):
    taus = [as_float64(t) for t in family.task_vectors]
    reference = jax.tree.map(lambda b, *t: b + 0.4 * sum(t), as_float64(family.base), *taus)
    assert relative_error(materialise(family.base, basis, uniform_gains(basis, 0.4)), reference) < (
        1e-6
    )


@pytest.mark.parametrize("seed", range(3))
def test_children_agree_with_full_weights_in_float64(family, basis, seed):
    """The bar of the project: 1e-5, unmutated and mutated, over three generations."""
    layout = gain_layout(basis)
    taus = [as_float64(t) for t in family.task_vectors]
    crossover, mutation = linear_crossover(1.0, 0.3), expert_svd_mutation(basis, 0.1)
    gains, full = expert_gains(basis, 0), taus[0]
    for generation in range(3):
        other = (seed + generation) % 3
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), generation))
        child = crossover(keys[0], gains, expert_gains(basis, other))
        full = merge_full_weights(keys[0], full, taus[other])
        reference = jax.tree.map(np.add, as_float64(family.base), full)
        assert relative_error(materialise(family.base, basis, child), reference) < 1e-5

        gains = mutation(keys[1], child, jnp.int32(other))
        drawn = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), gains, child)
        full = mutate_full_weights(full, taus[other], drawn, layout, other)
        reference = jax.tree.map(np.add, as_float64(family.base), full)
        assert relative_error(materialise(family.base, basis, gains), reference) < 1e-5


def test_both_spaces_make_the_same_child(family, basis):
    key, expert = jax.random.key(5), jnp.int32(1)
    spectral = expert_svd_mutation(basis, 0.2)(key, expert_gains(basis, 0), expert)
    dense = expert_svd_mutation(basis, 0.2, space="dense")(
        key, expand(basis, expert_gains(basis, 0)), expert
    )
    assert relative_error(expand(basis, spectral), as_float64(dense)) < 1e-6


def test_untouched_leaves_have_rank_zero(family):
    taus = [t.replace(embed=np.zeros_like(t.embed)) for t in family.task_vectors]
    basis, report = decompose(taus, family.roles, base=family.base)
    assert basis.embed.u.shape == (20, 0)
    assert report.ranks["embed"] == (0, 0, 0)
    rebuilt = materialise(family.base, basis, uniform_gains(basis, 1.0))
    np.testing.assert_array_equal(rebuilt.embed, family.base.embed)
    mutated = expert_svd_mutation(basis)(jax.random.key(0), zero_gains(basis), jnp.int32(0))
    assert mutated.embed.shape == (0,)


def test_experts_may_touch_different_matrices(family):
    first, second, _ = family.task_vectors
    first = first.replace(embed=np.zeros_like(first.embed))
    basis, _ = decompose([first, second], family.roles)
    assert basis.embed.ranks == (0, 12)
    assert (
        relative_error(
            materialise(family.base, basis, expert_gains(basis, 1)), as_float64(family.experts[1])
        )
        < 1e-6
    )


def test_population_equals_one_by_one_and_the_basis_is_an_argument(family, basis):
    population = jax.tree.map(lambda *x: jnp.stack(x), *[expert_gains(basis, e) for e in range(3)])
    batched = jax.jit(jax.vmap(materialise, in_axes=(None, None, 0)))
    together = batched(family.base, basis, population)
    for e in range(3):
        alone = materialise(family.base, basis, expert_gains(basis, e))
        picked = jax.tree.map(lambda x, e=e: x[e], together)
        assert relative_error(picked, as_float64(alone)) < 1e-6
    constants = jax.make_jaxpr(expand)(basis, expert_gains(basis, 0)).consts
    assert sum(np.size(c) for c in constants) == 0


def test_bfloat16_base_keeps_its_dtype(family, basis):
    base = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), family.base)
    taus = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), t) for t in family.task_vectors]
    rounded, report = decompose(taus, family.roles, base=base)
    assert report.minimum() > 1 - 1e-9
    assert rounded.embed.u.dtype == jnp.float32
    model = materialise(base, rounded, expert_gains(rounded, 0))
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}


def test_expert_gains_accept_a_traced_expert(basis):
    traced = jax.jit(lambda e: expert_gains(gain_layout(basis), e))(jnp.int32(2))
    jax.tree.map(np.testing.assert_array_equal, traced, expert_gains(basis, 2))


def test_layout_is_hashable_static_and_describes_abstract_bases(basis):
    layout = gain_layout(basis)
    abstract = jax.eval_shape(lambda b: b, basis)
    assert gain_layout(abstract) == layout
    assert hash(gain_layout(abstract)) == hash(layout)
    assert gain_layout(layout) is layout
    assert layout.size == sum(x.size for x in jax.tree.leaves(zero_gains(basis)))
    assert isinstance(layout, GainLayout)


def test_operators_on_gains_hold_no_factor_arrays(basis):
    mutation = expert_svd_mutation(basis)
    assert isinstance(mutation, Partial)
    assert jax.tree.leaves(mutation) == [0.1]
    dense = expert_svd_mutation(basis, space="dense")
    assert {id(x) for x in jax.tree.leaves(basis)} <= {id(x) for x in jax.tree.leaves(dense)}


def test_a_bfloat16_weight_is_rounded_once(family, basis):
    base = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), family.base)
    gains = uniform_gains(basis, 0.3)
    model = materialise(base, basis, gains)
    exact = jax.tree.map(
        lambda b, t: np.asarray(b, np.float64) + t, base, as_float64(expand(basis, gains))
    )
    for found, wanted in zip(jax.tree.leaves(model), jax.tree.leaves(exact), strict=True):
        # A second rounding, of the task vector, would move a tenth of them.
        assert np.mean(np.asarray(found) == wanted.astype(jnp.bfloat16)) > 0.99


def test_bfloat16_factors_are_summed_in_float32(family, basis):
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), basis)
    built = expand(small, uniform_gains(basis, 1.0))
    assert built.embed.dtype == jnp.float32
    assert relative_error(built, as_float64(expand(basis, uniform_gains(basis, 1.0)))) < 0.01


def stacked(dtype, layers=24, m=96, n=128, rank=8):
    base = {"w": jnp.ones((layers, m, n), dtype)}
    u, v = jnp.ones((layers, m, rank), jnp.float32), jnp.ones((layers, n, rank), jnp.float32)
    return base, {"w": MatrixFactors(u=u, v=v, ranks=(rank,))}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_alive_besides_the_model_is_one_layer(dtype):
    base, basis = stacked(dtype)
    model, layer = base["w"].nbytes, 96 * 128 * 4
    room = 3 * layer + (0 if dtype == jnp.float32 else 2 * model)  # see `materialise`
    gains = zero_gains(basis)
    build: Any = compile_materialise(base)
    rebuild: Any = compile_materialise(base, reuse=True)
    used: Any = build.lower(base, basis, gains).compile().memory_analysis()
    assert used.temp_size_in_bytes < room
    assert used.output_size_in_bytes <= model + 64
    donated = jax.jit(materialise, donate_argnums=0).lower(base, basis, gains)
    reused = rebuild.lower(base, base, basis, gains)
    for used in (donated.compile().memory_analysis(), reused.compile().memory_analysis()):
        assert used.alias_size_in_bytes == model
        assert used.temp_size_in_bytes < room


def test_a_model_is_built_in_the_memory_of_an_old_one():
    base, basis = stacked(jnp.bfloat16)
    rebuild = compile_materialise(base, reuse=True)
    old = jax.tree.map(jnp.zeros_like, base)
    place = old["w"].unsafe_buffer_pointer()
    new = rebuild(old, base, basis, uniform_gains(basis, 0.25))
    assert old["w"].is_deleted()
    assert new["w"].unsafe_buffer_pointer() == place
    np.testing.assert_array_equal(np.asarray(new["w"], np.float32), 3.0)
    np.testing.assert_array_equal(np.asarray(base["w"], np.float32), 1.0)


ON_EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from cycleqd_jax.merging.spectral import MatrixFactors, compile_materialise, materialise

mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("population", "model"))
place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
draw = np.random.default_rng(0).normal
base, u, v = (draw(size=s).astype(np.float32) for s in [(3, 16, 24), (3, 16, 6), (3, 24, 6)])
gains = {"w": draw(size=(3, 6)).astype(np.float32)}
alone = materialise({"w": base}, {"w": MatrixFactors(u=u, v=v, ranks=(6,))}, gains)
sharded = {"w": place(base, None, None, "model")}
basis = {"w": MatrixFactors(u=place(u), v=place(v, None, "model"), ranks=(6,))}
gains = {"w": place(gains["w"])}
build = compile_materialise(sharded)
model = build(sharded, basis, gains)
np.testing.assert_allclose(model["w"], alone["w"], atol=1e-6)
assert model["w"].sharding.is_equivalent_to(sharded["w"].sharding, 3), model["w"].sharding
text = build.lower(sharded, basis, gains).compile().as_text()
found = [c for c in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if c in text]
print("equal", found)
"""


def test_sharded_weights_are_built_where_they_lie(on_eight_devices):
    """Same weights as on one device, in the base's sharding, with no communication at all."""
    assert on_eight_devices(ON_EIGHT_DEVICES) == "equal []"


class TestBadInput:
    def test_no_expert(self, family):
        with pytest.raises(ValueError, match="at least one task vector, found none"):
            decompose([], family.roles)

    def test_unknown_role(self):
        with pytest.raises(ValueError, match=r"leaf 'w': expected a role.*found 'norm'"):
            decompose([{"w": np.ones((2, 2))}], {"w": "norm"})

    def test_matrix_with_one_axis(self):
        with pytest.raises(ValueError, match=r"leaf 'w': a matrix needs at least 2.*\(3,\)"):
            decompose([{"w": np.ones(3)}], {"w": "matrix"})

    def test_entries_that_are_not_finite(self):
        broken = {"w": np.asarray([[1.0, np.nan]])}
        with pytest.raises(ValueError, match=r"leaf 'w' of task vector 1.*not finite"):
            decompose([{"w": np.ones((1, 2))}, broken], {"w": "matrix"})

    def test_rank_zero(self):
        with pytest.raises(ValueError, match="at least 1, found 0"):
            decompose([{"w": np.ones((2, 2))}], {"w": "matrix"}, rank=0)

    def test_experts_that_differ(self):
        with pytest.raises(ValueError, match=r"leaf 'w': expected shape \(2, 2\).*task vector 1"):
            decompose([{"w": np.ones((2, 2))}, {"w": np.ones((2, 3))}], {"w": "matrix"})

    def test_roles_of_another_model(self):
        with pytest.raises(ValueError, match=r"leaf 'w' of task vector 0 is missing in the roles"):
            decompose([{"w": np.ones((2, 2))}], {"v": "matrix"})

    def test_expert_that_does_not_exist(self, basis):
        with pytest.raises(ValueError, match=r"expert must be in 0..2, found 3"):
            expert_gains(basis, 3)

    def test_a_tree_that_is_no_basis(self):
        with pytest.raises(ValueError, match="expected a tree of MatrixFactors"):
            zero_gains({"w": np.ones(3)})
