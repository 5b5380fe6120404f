import functools
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from qdax.core.emitters.multi_emitter import MultiEmitter
from qdax.core.emitters.mutation_operators import isoline_variation
from qdax.core.emitters.repertoire_selectors.uniform_selector import UniformSelector
from qdax.core.emitters.standard_emitters import MixingEmitter
from qdax.core.map_elites import MAPElites

from cycleqd_jax.merging.crossover import linear_crossover
from cycleqd_jax.merging.expert_svd import expert_svd_mutation
from cycleqd_jax.merging.layout import GainLayout, LeafLayout
from cycleqd_jax.merging.mutation import gaussian_mutation, no_mutation
from cycleqd_jax.qd import emitter as emitter_module
from cycleqd_jax.qd import insertion
from cycleqd_jax.qd import metrics as metrics_module
from cycleqd_jax.qd import pool as module
from cycleqd_jax.qd.emitter import CycleQDEmitter, breed
from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.metrics import qd_metrics
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.qd.schedule import cycle_per_child
from cycleqd_jax.qd.selection import (
    EliteSelector,
    RandomSelector,
    WeightedSelector,
    draw_parents,
)

SIZE = 5


def score(genotypes, key):
    """K skills that cannot all be had: closeness to K corners."""
    del key
    x = genotypes["x"]
    corners = jnp.eye(3, SIZE)
    scores = jnp.exp(-jnp.sum((x[:, None] - corners) ** 2, axis=-1))
    return scores, scores, {}


def population(count=24, seed=0):
    return {"x": jax.random.uniform(jax.random.key(seed), (count, SIZE))}


def grid_of(tasks=3, bins=6):
    return make_grid([0.0] * tasks, [1.0] * tasks, bins)


def emitter_of(batch=16, **parts):
    chosen = {
        "selector": EliteSelector(),
        "crossover": linear_crossover(1.0, 0.3),
        "mutation": gaussian_mutation(0.1),
        **parts,
    }
    return CycleQDEmitter(batch_size=batch, num_archives=3, **chosen)


def start(emitter, **options):
    init = functools.partial(CyclicRepertoire.init, **options)
    algorithm = MAPElites(score, emitter, qd_metrics, init)
    repertoire, state, _ = algorithm.init(population(), grid_of(), jax.random.key(0))
    return algorithm, repertoire, state


@pytest.mark.slow
def test_qdax_core_pulls_no_heavy_packages():
    code = (
        "import sys, cycleqd_jax.qd.emitter, qdax.core.map_elites\n"
        "assert not {'torch', 'brax', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ask_tell_improves_the_archives():
    algorithm, repertoire, state = start(emitter_of())
    before = qd_metrics(repertoire)
    key = jax.random.key(1)
    for _ in range(9):
        key, ask_key, score_key = jax.random.split(key, 3)
        children, info = algorithm.ask(repertoire, state, ask_key)
        fitnesses, descriptors, extra = score(children, score_key)
        repertoire, state, metrics = algorithm.tell(
            children, fitnesses, descriptors, repertoire, state, extra, info
        )
    assert int(state.generation) == 9
    assert (metrics["qd_score"] > before["qd_score"]).all()
    assert (metrics["coverage"] >= before["coverage"]).all()


def test_scan_update_is_the_eager_run():
    algorithm, repertoire, state = start(emitter_of())
    carry = (repertoire, state, jax.random.key(3))
    scanned, history = jax.jit(lambda c: jax.lax.scan(algorithm.scan_update, c, None, length=6))(
        carry
    )
    for _ in range(6):
        carry, metrics = algorithm.scan_update(carry, None)
    np.testing.assert_array_equal(scanned[0].cells, carry[0].cells)
    np.testing.assert_allclose(scanned[0].scores, carry[0].scores, rtol=1e-5)
    np.testing.assert_allclose(history["qd_score"][-1], metrics["qd_score"], rtol=1e-5)


def test_children_name_their_parents_and_archive():
    algorithm, repertoire, state = start(emitter_of(mutation=no_mutation(), batch=32))
    for generation in range(4):
        state = state.replace(generation=jnp.int32(generation))
        children, info = algorithm.ask(repertoire, state, jax.random.key(generation))
        np.testing.assert_array_equal(info["archive"], np.full(32, generation % 3))
        parents = np.asarray(info["parents"])
        assert parents.shape == (32, 2)
        members = set(np.asarray(repertoire.cells[generation % 3]).tolist())
        assert set(parents.ravel().tolist()) <= members - {-1}
        assert (parents[:, 0] != parents[:, 1]).all()
        pair = repertoire.gather(info["parents"])["x"]
        lines = np.asarray(children["x"] - pair[:, 0]), np.asarray(pair[:, 1] - pair[:, 0])
        share = (lines[0] * lines[1]).sum(-1) / (lines[1] ** 2).sum(-1)
        np.testing.assert_allclose(lines[0], share[:, None] * lines[1], atol=1e-5)


def test_the_archive_decides_which_expert_mutates():
    layout = GainLayout(jax.tree.structure({"x": 0}), (LeafLayout("matrix", (), (2, 1, 2)),))
    emitter = emitter_of(
        crossover=lambda key, a, b: jax.tree.map(jnp.zeros_like, a),
        mutation=expert_svd_mutation(layout, 0.1),
        schedule=cycle_per_child,
        expert_of_archive=(2, 0, 1),
    )
    _, repertoire, state = start(emitter)
    children, info = emitter.emit(repertoire, state, jax.random.key(0))
    owner = np.asarray([0, 0, 1, 2, 2])
    for child, archive in zip(np.asarray(children["x"]), np.asarray(info["archive"]), strict=True):
        np.testing.assert_array_equal(child > 0, owner == (2, 0, 1)[archive])


def test_same_key_same_children_and_every_child_its_own_key():
    emitter = emitter_of()
    _, repertoire, state = start(emitter)
    one, _ = emitter.emit(repertoire, state, jax.random.key(5))
    same, _ = emitter.emit(repertoire, state, jax.random.key(5))
    other, _ = emitter.emit(repertoire, state, jax.random.key(6))
    np.testing.assert_array_equal(one["x"], same["x"])
    assert not np.intersect1d(one["x"], other["x"]).size
    steps = gaussian_only(repertoire, state)
    assert np.unique(steps).size == steps.size


def gaussian_only(repertoire, state):
    """What the mutation added to each child when the crossover returns zero."""
    emitter = emitter_of(crossover=lambda key, a, b: jax.tree.map(jnp.zeros_like, a))
    return np.asarray(emitter.emit(repertoire, state, jax.random.key(0))[0]["x"])


class OneByOne(RandomSelector):
    """Has its own way to select, so it is asked once a child."""

    def select(self, repertoire, key, num_samples):
        return super().select(repertoire, key, num_samples)


@pytest.mark.parametrize("selector", [RandomSelector(), OneByOne()])
def test_no_random_key_is_used_twice(monkeypatch, selector):
    """The keys that reach the draw of parents, crossover and mutation of all children differ."""
    seen: list[tuple[int, ...]] = []

    def record(keys):
        jax.debug.callback(
            lambda k: seen.extend(map(tuple, np.reshape(k, (-1, 2)))), jax.random.key_data(keys)
        )

    def recorded_draw(selector, repertoire, keys, archive):
        record(keys)
        return draw_parents(selector, repertoire, keys, archive)

    monkeypatch.setattr(emitter_module, "draw_parents", recorded_draw)
    compiled: Any = breed
    compiled.clear_cache()

    def crossover(key, a, b):
        record(key)
        return a

    def mutation(key, genotype, expert):
        record(key)
        return genotype

    emitter = emitter_of(selector=selector, crossover=crossover, mutation=mutation, batch=4)
    _, repertoire, state = start(emitter)
    emitter.emit(repertoire, state, jax.random.key(0))
    jax.effects_barrier()
    compiled.clear_cache()
    assert len(seen) == 12
    assert len(set(map(tuple, np.asarray(seen).tolist()))) == 12


def test_a_single_elite_breeds_with_itself():
    emitter = emitter_of(mutation=no_mutation())
    genotypes = population(1)
    scores, _, _ = score(genotypes, None)
    repertoire = CyclicRepertoire.init(genotypes, scores, scores, grid_of())
    state = emitter.init(jax.random.key(0), repertoire, genotypes, scores, scores, {})
    children, _ = emitter.emit(repertoire, state, jax.random.key(0))
    np.testing.assert_allclose(children["x"], np.tile(genotypes["x"], (16, 1)), rtol=1e-5)


@pytest.mark.parametrize("tasks", [2, 4])
def test_other_numbers_of_tasks(tasks):
    genotypes = population(12)
    scores = genotypes["x"][:, :tasks]
    repertoire = CyclicRepertoire.init(genotypes, scores, scores, grid_of(tasks, 3))
    emitter = CycleQDEmitter(
        EliteSelector(formula="reference"), linear_crossover(), gaussian_mutation(0.1), 8, tasks
    )
    state = emitter.init(jax.random.key(0), repertoire, genotypes, scores, scores, {})
    children, info = emitter.emit(repertoire, state, jax.random.key(0))
    assert children["x"].shape == (8, SIZE)
    assert np.isfinite(np.asarray(children["x"])).all()
    assert (np.asarray(info["parents"]) >= 0).all()


def test_beside_a_qdax_emitter_in_a_multi_emitter():
    iso_line = functools.partial(isoline_variation, iso_sigma=0.05, line_sigma=0.1)
    emitter = MultiEmitter((emitter_of(16), MixingEmitter(lambda x, k: x, iso_line, 1.0, 8)))
    algorithm, repertoire, state = start(emitter)
    before = qd_metrics(repertoire)["qd_score"].sum()
    key = jax.random.key(2)
    for _ in range(4):
        key, step_key = jax.random.split(key)
        children, info = algorithm.ask(repertoire, state, step_key)
        assert children["x"].shape == (24, SIZE)
        assert set(info) == {"parents", "archive", "keys"}
        fitnesses, descriptors, extra = score(children, None)
        repertoire, state, metrics = algorithm.tell(
            children, fitnesses, descriptors, repertoire, state, extra
        )
    assert int(state.emitter_states[0].generation) == 4
    assert metrics["qd_score"].sum() > before


def test_qdax_uniform_selector_picks_parents():
    emitter = emitter_of(selector=UniformSelector(select_with_replacement=False))
    _, repertoire, state = start(emitter)
    _, info = emitter.emit(repertoire, state, jax.random.key(0))
    assert set(np.ravel(info["parents"]).tolist()) <= set(repertoire.cells[0].tolist()) - {-1}


def test_your_own_parts_take_a_few_lines():
    def coin_flips(key, a, b):
        flips = jax.random.bernoulli(key, shape=a["x"].shape)
        return {"x": jnp.where(flips, a["x"], b["x"])}

    class Greedy(WeightedSelector):
        def weights(self, archive):
            return jnp.exp(50.0 * archive.fitnesses[:, 0])

    def only_the_last(generation, batch_size, num_archives):
        return jnp.full(batch_size, num_archives - 1, jnp.int32)

    emitter = emitter_of(
        selector=Greedy(), crossover=coin_flips, mutation=no_mutation(), schedule=only_the_last
    )
    _, repertoire, state = start(emitter)
    children, info = emitter.emit(repertoire, state, jax.random.key(0))
    np.testing.assert_array_equal(info["archive"], np.full(16, 2))
    pair = np.asarray(repertoire.gather(info["parents"])["x"])
    child = np.asarray(children["x"])
    assert ((child == pair[:, 0]) | (child == pair[:, 1])).all()


def test_equal_emitters_and_many_generations_compile_once():
    compiled: Any = breed
    compiled.clear_cache()
    for _ in range(2):
        emitter = emitter_of(mutation=gaussian_mutation(0.1), selector=RandomSelector())
        algorithm, repertoire, state = start(emitter)
        key = jax.random.key(0)
        for _ in range(5):
            key, step_key = jax.random.split(key)
            repertoire, state, _ = algorithm.update(repertoire, state, step_key)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("in_place", [False, True])
def test_a_hundred_generations_of_ask_and_tell_compile_each_hot_function_once(in_place):
    hot: dict[str, Any] = {
        "breed": breed,
        "decide": insertion.decide,
        "write": module._write_in_place if in_place else module._write,
        "metrics": metrics_module._metrics,
    }
    emitter = emitter_of(mutation=gaussian_mutation(0.1), schedule=cycle_per_child)
    algorithm, repertoire, state = start(emitter, in_place=in_place)
    for function in hot.values():
        function.clear_cache()
    key = jax.random.key(0)
    for _ in range(100):
        key, ask_key = jax.random.split(key)
        children, info = algorithm.ask(repertoire, state, ask_key)
        fitnesses, descriptors, extra = score(children, None)
        repertoire, state, _ = algorithm.tell(
            children, fitnesses, descriptors, repertoire, state, extra, info
        )
    assert {name: function._cache_size() for name, function in hot.items()} == dict.fromkeys(hot, 1)


def test_the_scan_writes_into_the_pool_it_carries():
    """The compiled loop holds no copy of an array of the pool's shape."""
    algorithm, repertoire, state = start(emitter_of(), capacity=108 + 23)
    scan = jax.jit(
        lambda c: jax.lax.scan(algorithm.scan_update, c, None, length=6)[0], donate_argnums=0
    )
    text = scan.lower((repertoire, state, jax.random.key(0))).compile().as_text() or ""
    pool = rf"f32\[{108 + 23},{SIZE}\]\S*"
    assert re.search(rf"= {pool} (scatter|fusion)\(", text)
    assert not re.search(rf"= {pool} copy\(", text)


SHARDED = """
import jax, numpy as np, pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from cycleqd_jax.qd.emitter import CycleQDState
from tests.qd.test_emitter import emitter_of, start

mesh = jax.make_mesh((4, 2), ("population", "model"), axis_types=(AxisType.Auto,) * 2)
split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("population",), ()))

def run(emitter, place):
    algorithm, repertoire, state = start(emitter)
    scan = jax.jit(lambda c: jax.lax.scan(algorithm.scan_update, c, None, length=5)[0])
    carry = jax.tree.map(place, (repertoire, state, jax.random.key(3)))
    return scan(carry), scan.lower(carry).compile().as_text()

(one, _, _), _ = run(emitter_of(), lambda x: x)
(many, _, _), text = run(emitter_of(sharding=split), lambda x: jax.device_put(x, whole))
for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    assert b.sharding.is_fully_replicated
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
# 16 children over 4 shards: a device breeds and scores 4, and gathers the others' rows to write.
assert "f32[4,5]" in text and "all-gather" in text
children, _ = emitter_of(sharding=split).emit(
    jax.device_put(many, whole), CycleQDState(generation=np.int32(2)), jax.random.key(0)
)
assert children["x"].sharding.shard_shape((16, 5)) == (4, 5)
with pytest.raises(ValueError, match="batch of 18 children cannot be split evenly"):
    emitter_of(18, sharding=split)
"""


@pytest.mark.slow
def test_a_population_sharded_over_devices_gives_the_single_device_archives(on_eight_devices):
    assert on_eight_devices(SHARDED) == ""


def test_arrays_of_an_operator_are_arguments_not_constants():
    big = jnp.ones((1000, SIZE))
    emitter = emitter_of(mutation=Partial(lambda w, key, g, e: {"x": g["x"] + w[e]}, big))
    _, repertoire, state = start(emitter)
    jaxpr = jax.make_jaxpr(
        lambda r, m, key: breed(
            r,
            state,
            key,
            linear_crossover(),
            m,
            selector=EliteSelector(),
            schedule=cycle_per_child,
            experts=(0, 1, 2),
            batch_size=4,
        )
    )(repertoire, emitter._mutation, jax.random.key(0))
    assert max((np.size(c) for c in jaxpr.consts), default=0) < big.size


class TestBadInput:
    def test_empty_batch(self):
        with pytest.raises(ValueError, match="at least 1 child, found 0"):
            emitter_of(batch=0)

    def test_one_archive(self):
        with pytest.raises(ValueError, match="at least 2 archives, found 1"):
            CycleQDEmitter(EliteSelector(), linear_crossover(), no_mutation(), 4, 1)

    def test_experts_do_not_match_archives(self):
        with pytest.raises(ValueError, match="expected 3 experts, one an archive, found 2"):
            emitter_of(expert_of_archive=(0, 1))

    def test_repertoire_with_other_archives(self):
        scores = jnp.ones((2, 2))
        repertoire = CyclicRepertoire.init({"x": scores}, scores, scores, grid_of(2))
        with pytest.raises(ValueError, match="made for 3 archives, the repertoire has 2"):
            emitter_of().init(jax.random.key(0), repertoire, None, None, None, {})
