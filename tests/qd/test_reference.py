"""The `reference` preset against an independent transcription of the published loop."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qdax.core.map_elites import MAPElites

from cycleqd_jax.merging.expert_svd import draw_expert_gains
from cycleqd_jax.merging.spectral import decompose, expand, expert_gains, gain_layout
from cycleqd_jax.qd.emitter import CycleQDEmitter
from cycleqd_jax.qd.metrics import qd_metrics
from cycleqd_jax.qd.presets import REFERENCE, Preset
from cycleqd_jax.qd.repertoire import CyclicRepertoire


def _published() -> Any:
    path = Path(__file__).with_name("published_loop.py")
    spec = importlib.util.spec_from_file_location("published_loop", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PUBLISHED = _published()
TASKS = 3
ROLES = {"attention": "matrix", "embed": "matrix", "norm": "vector"}
SHAPES = {"attention": (2, 6, 5), "embed": (7, 4), "norm": (5,)}
RANGES = ((0.05, 0.8), (0.1, 0.9), (0.0, 0.7))


def random_task_vector(seed):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in SHAPES.items()
    }


EXPERTS = [random_task_vector(e) for e in range(TASKS)]
TARGETS = [random_task_vector(50 + k) for k in range(TASKS)]
BASIS, _ = decompose(EXPERTS, ROLES)
LAYOUT = gain_layout(BASIS)


def score(tau, xp):
    """K skills between 0 and 1 that share parameters; not a rule, so given to both loops."""
    scores = []
    for k in range(TASKS):
        fit = sum(
            xp.sum(tau[name] * (EXPERTS[k][name] + 0.5 * TARGETS[k][name])) for name in sorted(tau)
        )
        scores.append(1.0 / (1.0 + xp.exp(1.0 - 0.5 * fit)))
    return xp.stack(scores)


def score_dense(genotypes, key):
    del key
    scores = jax.vmap(lambda tau: score(tau, jnp))(genotypes["tau"])
    return scores, scores, {}


def score_gains(genotypes, key):
    del key
    scores = jax.vmap(lambda gains: score(expand(BASIS, gains), jnp))(genotypes["tau"])
    return scores, scores, {}


SCORING = {"dense": jax.jit(score_dense), "spectral": jax.jit(score_gains)}


def recording_emitter(preset: Preset, batch: int, space: Any) -> CycleQDEmitter:
    """The preset's emitter, whose children also carry the random numbers they were made with."""
    cross, mutate = preset.build_crossover(BASIS, space), preset.build_mutation(BASIS, space)

    def crossover(key, a, b):
        normals = jax.random.normal(key, (2,), jnp.float32)
        return {**a, "tau": cross(key, a["tau"], b["tau"]), "normals": normals}

    def mutation(key, child, expert):
        uniforms = draw_expert_gains(key, LAYOUT, expert, 1.0)
        return {**child, "tau": mutate(key, child["tau"], expert), "uniforms": uniforms}

    return CycleQDEmitter(
        preset.build_selector(),
        crossover,
        mutation,
        batch,
        TASKS,
        schedule=preset.build_schedule(),
    )


def experts_of(space):
    if space == "dense":
        return EXPERTS
    return [expert_gains(BASIS, e) for e in range(TASKS)]


def start(emitter, preset, space):
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *experts_of(space))
    genotypes = {
        "tau": stacked,
        "normals": jnp.zeros((TASKS, 2)),
        "uniforms": jax.tree.map(lambda x: jnp.stack([x] * TASKS), LAYOUT.zeros()),
    }
    algorithm = MAPElites(SCORING[space], emitter, qd_metrics, CyclicRepertoire.init)
    scores = SCORING[space](genotypes, None)[0]
    grid = preset.build_grid(scores)
    repertoire, state, _ = algorithm.init(genotypes, grid, jax.random.key(0))
    return algorithm, repertoire, state


def as_float64(tau):
    return {name: np.asarray(value, np.float64) for name, value in tau.items()}


def cells_of(repertoire, k):
    """Cell as bin numbers -> slot of the pool, for the occupied cells of archive k."""
    row, bins = np.asarray(repertoire.cells[k]), repertoire.tessellation.bins
    shape = (bins,) * (TASKS - 1)
    return {
        tuple(map(int, np.unravel_index(c, shape))): int(row[c]) for c in np.flatnonzero(row >= 0)
    }


def check_probabilities(preset, repertoire, archives):
    selector: Any = preset.build_selector()
    shape = (preset.bins,) * (TASKS - 1)
    for k, archive in enumerate(archives):
        found = np.asarray(selector.probabilities(repertoire.index_archive(k)))
        expected = np.zeros(found.shape)
        for cell, probability in PUBLISHED.parent_probabilities(archive).items():
            expected[np.ravel_multi_index(cell, shape)] = probability
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def check_archives(repertoire, archives, to_dense):
    pool_scores = np.asarray(repertoire.scores)
    models = to_dense(repertoire.genotypes["tau"])
    for k, archive in enumerate(archives):
        slots = cells_of(repertoire, k)
        assert set(slots) == set(archive)
        for cell, (quality, model) in archive.items():
            np.testing.assert_allclose(pool_scores[slots[cell], k], quality, rtol=1e-6, atol=1e-6)
            for name, value in model.items():
                np.testing.assert_allclose(models[name][slots[cell]], value, rtol=1e-6, atol=1e-6)


def breed_published(archives, turn, parent_slots, slots, draws, std):
    """One child by the published rules from the parents and numbers that our emitter drew."""
    k = turn % TASKS
    cell_of_slot = {slot: cell for cell, slot in slots[k].items()}
    cells = [cell_of_slot[int(slot)] for slot in parent_slots]
    if len(archives[k]) > 1:
        assert cells[0] != cells[1]
    first, second = (archives[k][cell][1] for cell in cells)
    child = PUBLISHED.crossover(first, second, draws["normals"], std)
    uniforms = {
        name: np.asarray(draws["uniforms"][name])[..., leaf.blocks[k]]
        for name, leaf in zip(sorted(ROLES), LAYOUT.leaves, strict=True)
        if leaf.role == "matrix"
    }
    return PUBLISHED.mutate(child, as_float64(EXPERTS[k]), uniforms)


@pytest.mark.parametrize(
    ("space", "std", "batch", "generations"),
    [
        ("dense", 0.8, 5, 12),
        pytest.param("dense", 0.01, 4, 9, marks=pytest.mark.slow),
        pytest.param("spectral", 0.8, 1, 30, marks=pytest.mark.slow),
    ],
)
def test_the_archives_are_those_of_the_published_loop(space, std, batch, generations):
    """With the published spread of the merge weights, and with one that fills the archives."""
    preset = dataclasses.replace(REFERENCE, ranges=RANGES, crossover_std=std)
    algorithm, repertoire, state = start(recording_emitter(preset, batch, space), preset, space)
    to_dense = jax.jit(jax.vmap(lambda g: g if space == "dense" else expand(BASIS, g)))

    archives: list[dict[Any, Any]] = [{} for _ in range(TASKS)]
    for tau in map(as_float64, EXPERTS):
        PUBLISHED.offer(archives, score(tau, np), tau, RANGES, preset.bins)
    check_archives(repertoire, archives, to_dense)

    turn, events = 0, []
    for generation in range(generations):
        check_probabilities(preset, repertoire, archives)
        children, info = algorithm.ask(repertoire, state, jax.random.key(generation))
        slots = [cells_of(repertoire, k) for k in range(TASKS)]
        models = []
        for i in range(batch):
            assert int(info["archive"][i]) == turn % TASKS
            draws = jax.tree.map(lambda x, i=i: np.asarray(x[i]), children)
            models.append(breed_published(archives, turn, info["parents"][i], slots, draws, std))
            turn += 1
        dense = to_dense(children["tau"])
        for name in SHAPES:
            expected = np.stack([model[name] for model in models])
            np.testing.assert_allclose(dense[name], expected, rtol=1e-6, atol=1e-6)
        for model in models:
            events += PUBLISHED.offer(archives, score(model, np), model, RANGES, preset.bins)
        fitnesses, descriptors, extra = SCORING[space](children, None)
        repertoire, state, _ = algorithm.tell(
            children, fitnesses, descriptors, repertoire, state, extra, info
        )
        check_archives(repertoire, archives, to_dense)
    assert min(events.count(event) for event in ("new", "better", "no")) >= 5


def test_the_preset_makes_the_children_that_were_compared():
    """The recorded parts are the preset's own emitter: same key, same parents, same children."""
    preset = dataclasses.replace(REFERENCE, ranges=RANGES)
    _, recorded, state = start(recording_emitter(preset, 4, "dense"), preset, "dense")
    emitter = preset.build_emitter(BASIS, 4, TASKS, space="dense")
    plain = recorded.replace(genotypes=recorded.genotypes["tau"])
    children, info = recording_emitter(preset, 4, "dense").emit(recorded, state, jax.random.key(7))
    alone, alone_info = emitter.emit(plain, state, jax.random.key(7))
    np.testing.assert_array_equal(alone_info["parents"], info["parents"])
    for name in SHAPES:
        np.testing.assert_allclose(alone[name], children["tau"][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "scores",
    [
        [[0.31, 0.52, 0.21]],
        [[0.31, 0.52, 0.21], [0.31, 0.23, 0.62], [0.31, 0.75, 0.11]],
        [[0.12, 0.52, 0.21], [0.31, 0.52, 0.62], [0.62, 0.52, 0.11]],
        [[0.31, 0.52, 0.21], [0.31, 0.52, 0.22], [0.31, 0.52, 0.21], [0.12, 0.52, 0.22]],
        np.random.default_rng(3).uniform(-0.1, 1.0, size=(40, 3)).tolist(),
    ],
    ids=["single elite", "equal qualities", "equal behaviour", "ties", "many"],
)
def test_unusual_archives(scores):
    """One elite, minimum equal to maximum, ties, scores outside the ranges; none on an edge."""
    preset = dataclasses.replace(REFERENCE, ranges=RANGES)
    rows = np.asarray(scores, np.float32)
    genotypes = {"id": jnp.arange(len(rows), dtype=jnp.int32)}
    repertoire = CyclicRepertoire.init(genotypes, rows, rows, preset.build_grid(rows))
    archives: list[dict[Any, Any]] = [{} for _ in range(TASKS)]
    for i, row in enumerate(rows):
        PUBLISHED.offer(archives, row.astype(np.float64), i, RANGES, preset.bins)
    ids = np.asarray(repertoire.genotypes["id"])
    for k, archive in enumerate(archives):
        found = {cell: ids[slot] for cell, slot in cells_of(repertoire, k).items()}
        assert found == {cell: model for cell, (_, model) in archive.items()}
    check_probabilities(preset, repertoire, archives)


def test_scores_on_an_edge_and_outside():
    """Bins are (lower, upper]; edges that are exact in binary leave no room for rounding."""
    ranges = ((0.0, 0.9375),) * TASKS
    preset = dataclasses.replace(REFERENCE, ranges=ranges)
    values = np.concatenate([np.arange(-2, 19) / 16, np.arange(-2, 19) / 16 + 1e-3])
    for value in values.astype(np.float32):
        rows = np.full((1, TASKS), value, np.float32)
        repertoire = CyclicRepertoire.init(
            {"id": jnp.zeros(1)}, rows, rows, preset.build_grid(rows)
        )
        expected = PUBLISHED.cell_of(rows[0], 0, ranges, 15)
        assert set(cells_of(repertoire, 0)) == {expected}, value
