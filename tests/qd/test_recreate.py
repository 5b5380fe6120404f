"""Children bred again from what the emitter said of them, bit for bit, for every operator."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.merging.expert_svd import expert_svd_mutation
from cycleqd_jax.merging.spectral import MatrixFactors, VectorFactors, expert_gains, gain_layout
from cycleqd_jax.qd.control import ControlledEmitter
from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.parametric import parametric_crossover, parametric_mutation
from cycleqd_jax.qd.presets import DEFAULT, PRESETS
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.qd.selection import EliteSelector

RNG = np.random.default_rng(0)
BATCH = 5


def random(*shape):
    return jnp.asarray(RNG.normal(size=shape).astype(np.float32))


BASIS = {
    "w": MatrixFactors(random(2, 9, 17), random(2, 8, 17), ranks=(8, 2, 7)),
    "norm": VectorFactors(random(2, 3, 4)),
}
LAYOUT = gain_layout(BASIS)
OTHERS = {
    "slerp": dataclasses.replace(DEFAULT, crossover="slerp"),
    "singular_values": dataclasses.replace(DEFAULT, mutation="singular_values"),
    "gaussian": dataclasses.replace(DEFAULT, mutation="gaussian"),
}


def emitter_of(name):
    if name == "controlled":
        mutation = parametric_mutation(expert_svd_mutation(LAYOUT, 1.0))
        return ControlledEmitter(EliteSelector(), parametric_crossover(), mutation, BATCH, 3)
    preset = dataclasses.replace({**PRESETS, **OTHERS}[name], ranges=None)
    return preset.build_emitter(BASIS, BATCH, 3)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def rows(tree, index):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


@pytest.mark.parametrize(
    "name",
    [*PRESETS, *[pytest.param(name, marks=pytest.mark.slow) for name in (*OTHERS, "controlled")]],
)
def test_children_come_out_again_alone_or_in_company_in_the_shape_of_their_batch(name):
    emitter = emitter_of(name)
    experts = jax.vmap(functools.partial(expert_gains, LAYOUT))(jnp.arange(3, dtype=jnp.int32))
    scores = jnp.asarray(RNG.uniform(size=(3, 3)).astype(np.float32))
    grid = make_grid([0.0] * 3, [1.0] * 3, 4)
    pool = CyclicRepertoire.init(experts, scores, scores, grid, {})
    state = emitter.init(jax.random.key(1), pool, experts, scores, scores, {})
    for generation in range(3):
        children, info = emitter.emit(pool, state, jax.random.key(generation))
        first, second = (pool.gather(info["parents"][:, side]) for side in (0, 1))
        assert bits(emitter.recreate(first, second, info)) == bits(children)
        for child in range(BATCH):
            # In its own row; the others are of somebody else.
            company = np.full(BATCH, (child + 1) % BATCH)
            company[child] = child
            parents = (rows(first, company), rows(second, company))
            again = emitter.recreate(*parents, rows(info, company))
            assert bits(rows(again, child)) == bits(rows(children, child))
        scores = jnp.asarray(RNG.uniform(size=(BATCH, 3)).astype(np.float32))
        pool = pool.add(children, scores, scores)
        state = emitter.state_update(state, pool, children, scores, scores, {})


@pytest.mark.parametrize("name", ["default", pytest.param("slerp", marks=pytest.mark.slow)])
def test_a_preset_tells_what_its_crossover_drew(name):
    preset = {**PRESETS, **OTHERS}[name]
    keys = jax.random.split(jax.random.key(0), 4)
    drawn = jax.vmap(preset.crossover_draw)(keys)
    a = {"w": jnp.ones((2, 17)), "norm": jnp.ones((2, 3))}
    b = jax.tree.map(jnp.zeros_like, a)
    (child,) = jax.tree.leaves(
        jax.vmap(preset.build_crossover(BASIS), (0, None, None))(keys, a, b)
    )[:1]
    if name == "default":  # the first parent's share
        share = drawn["weights"][:, 0] / drawn["weights"].sum(axis=1)
    else:  # parents of which one is zero lie on a chord
        share = 1 - drawn["place"]
    np.testing.assert_allclose(child[:, 0, 0], share, rtol=1e-5)
