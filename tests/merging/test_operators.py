"""Properties that every crossover and every mutation must have, over a registry."""

import importlib
import inspect
import pkgutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cycleqd_jax.merging
from cycleqd_jax.merging.child_svd import child_svd_mutation
from cycleqd_jax.merging.crossover import Crossover, linear_crossover
from cycleqd_jax.merging.expert_svd import expert_svd_mutation
from cycleqd_jax.merging.mutation import Mutation, gaussian_mutation, no_mutation
from cycleqd_jax.merging.singular_values import singular_value_mutation
from cycleqd_jax.merging.slerp import slerp_crossover
from cycleqd_jax.merging.spectral import decompose, expert_gains, gain_layout, materialise
from cycleqd_jax.merging.task_vector import apply_task_vector, check_same_tree

ROLES = {"m": "matrix", "n": "matrix", "v": "vector", "w": "vector"}
SHAPES = {"m": (2, 5, 4), "n": (3, 6), "v": (2, 4), "w": (4,)}


def random_model(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


BASE = random_model(9)
TAUS = [random_model(e) for e in range(3)]
BASIS, _ = decompose(TAUS, ROLES)
LAYOUT = gain_layout(BASIS)


class Case(NamedTuple):
    """An operator with a mutation's signature, and what it is made of."""

    builder: Any
    operator: Any
    space: str
    crossover: Any = None


def crossover_case(builder, crossover, space):
    """A crossover with the mutation's signature: the second parent follows from the first."""

    def operate(key, genotype, expert):
        return crossover(key, genotype, jax.tree.map(lambda x: jnp.flip(x, axis=-1), genotype))

    return Case(builder, operate, space, crossover)


REGISTRY = {
    "linear": crossover_case(linear_crossover, linear_crossover(1.0, 0.3), "dense"),
    "slerp_spectral": crossover_case(slerp_crossover, slerp_crossover(BASIS), "spectral"),
    "slerp_dense": crossover_case(slerp_crossover, slerp_crossover(ROLES, space="dense"), "dense"),
    "expert_svd_spectral": Case(expert_svd_mutation, expert_svd_mutation(LAYOUT, 0.1), "spectral"),
    "expert_svd_dense": Case(
        expert_svd_mutation, expert_svd_mutation(BASIS, 0.1, space="dense"), "dense"
    ),
    "child_svd_spectral": Case(child_svd_mutation, child_svd_mutation(LAYOUT, 2.0), "spectral"),
    "child_svd_dense": Case(
        child_svd_mutation, child_svd_mutation(ROLES, 2.0, space="dense"), "dense"
    ),
    "singular_values_spectral": Case(
        singular_value_mutation, singular_value_mutation(LAYOUT, 0.1, 2), "spectral"
    ),
    "singular_values_dense": Case(
        singular_value_mutation,
        singular_value_mutation(ROLES, 0.1, 2, space="dense", base=BASE),
        "dense",
    ),
    "gaussian": Case(gaussian_mutation, gaussian_mutation(0.1), "dense"),
    "none": Case(no_mutation, no_mutation(), "spectral"),
}
JITTED = {name: jax.jit(case.operator) for name, case in REGISTRY.items()}
KEYS = jax.random.split(jax.random.key(11), 4)


def random_genotype(space, seed, dtype=jnp.float32):
    like, rng = LAYOUT.zeros() if space == "spectral" else TAUS[0], np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), like)


def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=tolerance, atol=tolerance
        )


def public_operators():
    """Public functions of the room that promise a crossover or a mutation."""
    found = set()
    for info in pkgutil.iter_modules(cycleqd_jax.merging.__path__):
        module = importlib.import_module(f"cycleqd_jax.merging.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            promised = inspect.get_annotations(function).get("return")
            if not name.startswith("_") and promised in (Crossover, Mutation):
                found.add(name)
    return found


def test_every_public_operator_is_in_the_registry():
    registered = {case.builder.__name__ for case in REGISTRY.values()}
    assert {"linear_crossover", "no_mutation"} <= public_operators()
    assert registered == public_operators()


@pytest.mark.parametrize("name", REGISTRY)
def test_an_operator_of_a_space_is_there_for_both(name):
    case = REGISTRY[name]
    takes_space = "space" in inspect.signature(case.builder).parameters
    spaces = {other.space for other in REGISTRY.values() if other.builder is case.builder}
    assert not takes_space or spaces == {"spectral", "dense"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", REGISTRY)
def test_every_operator(name, dtype):
    case = REGISTRY[name]
    operator = JITTED[name]
    parent = random_genotype(case.space, 3, dtype)
    before = jax.tree.map(np.array, parent)
    child = operator(KEYS[0], parent, jnp.int32(1))

    check_same_tree(parent, child)
    for x, y in zip(jax.tree.leaves(child), jax.tree.leaves(parent), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.isfinite(np.asarray(x, np.float32)).all()
    assert equal(parent, before)
    assert equal(child, operator(KEYS[0], parent, jnp.int32(1)))
    assert equal(child, operator(KEYS[1], parent, jnp.int32(1))) == (name == "none")
    if dtype == jnp.float32:
        assert_close(child, case.operator(KEYS[0], parent, jnp.int32(1)), 1e-5)


@pytest.mark.parametrize("name", REGISTRY)
def test_vmap_equals_a_loop(name):
    case = REGISTRY[name]
    parents = [random_genotype(case.space, s) for s in range(4)]
    experts = jnp.asarray([0, 1, 2, 1], jnp.int32)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parents)
    together = jax.jit(jax.vmap(case.operator))(KEYS, stacked, experts)
    one = JITTED[name]
    for i in range(4):
        alone = one(KEYS[i], parents[i], experts[i])
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, 1e-5)


@pytest.mark.parametrize("space", ["spectral", "dense"])
@pytest.mark.parametrize("expert", [0, 1, 2])
def test_an_expert_is_reproduced_from_its_genotype(space, expert):
    if space == "spectral":
        rebuilt = materialise(BASE, BASIS, expert_gains(BASIS, expert))
    else:
        rebuilt = apply_task_vector(BASE, TAUS[expert])
    assert_close(rebuilt, jax.tree.map(np.add, BASE, TAUS[expert]), 1e-5)


@pytest.mark.parametrize("name", [n for n in REGISTRY if "svd" in n or "singular" in n])
def test_vectors_pass_singular_mutations_unchanged(name):
    case = REGISTRY[name]
    parent = random_genotype(case.space, 5)
    child = case.operator(KEYS[0], parent, jnp.int32(0))
    for leaf in ("v", "w"):
        np.testing.assert_array_equal(child[leaf], parent[leaf])
    for leaf in ("m", "n"):
        assert not np.array_equal(child[leaf], parent[leaf])


@pytest.mark.parametrize("name", [n for n in REGISTRY if n not in ("linear", "none")])
def test_arrays_of_an_operator_are_arguments_not_constants(name):
    case = REGISTRY[name]
    if case.crossover is not None:
        traced = jax.make_jaxpr(lambda o, k, a: o(k, a, a))
        constants = traced(case.crossover, KEYS[0], random_genotype(case.space, 5)).consts
    else:
        traced = jax.make_jaxpr(lambda o, k, a: o(k, a, jnp.int32(0)))
        constants = traced(case.operator, KEYS[0], random_genotype(case.space, 5)).consts
    # A layout has an integer a gain of one layer (12 here); factors have 120 numbers and more.
    assert max((np.size(c) for c in constants), default=0) <= 12
