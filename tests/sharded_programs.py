"""Everything that runs on a mesh, on eight virtual CPU devices: run by `test_sharding.py`.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/sharded_programs.py FOLDER 4x2

Prints one JSON object: for every mesh what each program gave compared with one device, and which
collectives its compiled text has. A process of its own, since the number of devices is fixed when
JAX starts.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cycleqd_jax import sharding
from cycleqd_jax.lowering import lower_programs, needed_bytes
from cycleqd_jax.merging.crossover import linear_crossover
from cycleqd_jax.merging.expert_svd import expert_svd_mutation
from cycleqd_jax.merging.spectral import (
    compile_materialise,
    decompose,
    expand,
    expert_gains,
    gain_layout,
    uniform_gains,
)
from cycleqd_jax.merging.task_vector import task_vector
from cycleqd_jax.models.cache import decode_step, prefill, unstack_layers
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import load_model, save_model
from cycleqd_jax.models.generate import Decoder
from cycleqd_jax.models.kernels import attach, stack
from cycleqd_jax.models.llama import init_params, rope_tables
from cycleqd_jax.models.specs import roles
from cycleqd_jax.plan import make_plan
from cycleqd_jax.qd.emitter import CycleQDEmitter
from cycleqd_jax.qd.grid import make_grid
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.qd.selection import EliteSelector
from cycleqd_jax.workload import Workload

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_positions=64,
)
EXPERTS, RANK, CANDIDATES, ROWS, WIDTH = 3, 4, 8, 16, 16


class Reference:
    """The results of one device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "base"
        make = jax.jit(lambda seed: init_params(jax.random.key(seed), CONFIG))
        self.base = make(0)
        save_model(self.folder, CONFIG, self.base)
        self.taus = [task_vector(make(e + 1), self.base) for e in range(EXPERTS)]
        self.basis, _ = decompose(self.taus, roles(CONFIG), RANK)
        self.repertoire, self.state, self.emitter = self.search(None)
        self.children, _ = self.emitter.emit(self.repertoire, self.state, jax.random.key(7))
        self.scores = jax.random.uniform(jax.random.key(8), (CANDIDATES, EXPERTS))
        self.added = self.repertoire.add(self.children, self.scores, self.scores)
        self.child = jax.tree.map(lambda x: x[0], self.children)
        self.weights = compile_materialise(self.base)(self.base, self.basis, self.child)
        self.population = unstack_layers(jax.jit(attach)(self.base, self.basis, self.children))
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(1, 256, n).tolist() for n in rng.integers(3, WIDTH, ROWS)]
        self.owners = [i % CANDIDATES for i in range(ROWS)]
        self.texts = decoder(None).decode(self.prompts, self.owners, params=self.population)

    def search(self, mesh: Mesh | None) -> tuple[Any, Any, CycleQDEmitter]:
        layout = gain_layout(self.basis)
        experts = jax.tree.map(
            lambda *x: jnp.stack(x), *(expert_gains(layout, e) for e in range(EXPERTS))
        )
        scores = jnp.eye(EXPERTS) * 0.5 + 0.3
        grid = make_grid([0.0] * EXPERTS, [1.0] * EXPERTS, 4)
        emitter = CycleQDEmitter(
            EliteSelector(),
            linear_crossover(),
            expert_svd_mutation(layout, 0.1),
            CANDIDATES,
            EXPERTS,
            sharding=None if mesh is None else sharding.row_sharding(mesh),
        )
        repertoire = CyclicRepertoire.init(experts, scores, scores, grid, capacity=64)
        if mesh is not None:
            repertoire = jax.device_put(repertoire, sharding.replicated(mesh))
        state = emitter.init(jax.random.key(0), repertoire, None, None, None, {})
        return repertoire, state, emitter


def decoder(mesh: Mesh | None) -> Decoder:
    placement = None if mesh is None else sharding.batch_placement(CONFIG, mesh)
    return Decoder(
        None,
        CONFIG,
        stop_tokens=[0],
        pad_token=0,
        max_new_tokens=6,
        mode="rows",
        workers=1,
        placement=placement,
    )


def on_mesh(shape: str, one: Reference) -> dict[str, Any]:
    """Differences from one device (0 is equal), bytes a device, and collectives."""
    mesh = sharding.make_mesh(shape)
    places = sharding.weight_sharding(CONFIG, mesh)
    found: dict[str, Any] = {}

    _, base = load_model(one.folder, sharding=places)
    found["load"] = difference(base, one.base)
    found["load_bytes"] = [on_device(base), sum(x.nbytes for x in jax.tree.leaves(one.base))]

    lam = uniform_gains(one.basis, 0.3)
    basis, _ = decompose(one.taus, roles(CONFIG), RANK, mesh=mesh)
    found["decompose"] = difference(expand(basis, lam), expand(one.basis, lam))

    basis = jax.device_put(one.basis, sharding.weight_sharding(CONFIG, mesh, one.basis))
    repertoire, state, emitter = one.search(mesh)
    children, _ = emitter.emit(repertoire, state, jax.random.key(7))
    found["emit"] = difference(children, one.children)
    found["emit_split"] = on_device(children) * mesh.shape["population"] == sum(
        x.nbytes for x in jax.tree.leaves(children)
    )
    added = repertoire.add(children, one.scores, one.scores)
    found["add"] = difference(
        (added.cells, added.scores), (one.added.cells, one.added.scores)
    ) + difference(added.gather(added.cells), one.added.gather(one.added.cells))

    everywhere = sharding.replicated(mesh)
    child = jax.device_put(one.child, everywhere)
    build = compile_materialise(base)
    found["materialise"] = difference(build(base, basis, child), one.weights)
    found["materialise_text"] = collectives(build.lower(base, basis, child))  # type: ignore[attr-defined]

    gains = jax.device_put(children, everywhere)
    shapes = jax.eval_shape(lambda *trees: unstack_layers(attach(*trees)), base, basis, gains)
    attached = jax.jit(
        lambda *trees: unstack_layers(attach(*trees)),
        out_shardings=sharding.weight_sharding(CONFIG, mesh, shapes),
    )
    found["attach_text"] = collectives(attached.lower(base, basis, gains))
    population = attached(base, basis, gains)
    found |= decoding(mesh, population, one)
    if shape == "4x2":
        found["plan"] = planned_share(mesh)
    return found


def planned_share(mesh: Mesh) -> dict[str, float]:
    """The plan's bytes over the compiler's, at a size where weights and cache matter."""
    config = replace(CONFIG, vocab_size=4096, hidden_size=256, intermediate_size=704, head_dim=32)
    work = Workload(rank=32, candidates=8, prompts=4, prompt=32, new=32)
    plan = make_plan(config, mesh, work)
    lowered = lower_programs(config, mesh, work)
    return {name: plan.programs[name] / needed_bytes(x.compile()) for name, x in lowered.items()}


def decoding(mesh: Mesh, population: Any, one: Reference) -> dict[str, Any]:
    texts = decoder(mesh).decode(one.prompts, one.owners, params=population)
    found: dict[str, Any] = {
        "decode": sum(map(list.__ne__, texts, one.texts)),
        "texts": len(set(map(tuple, texts))),
    }
    split = sharding.row_sharding(mesh)
    tokens = jax.device_put(np.ones((ROWS, WIDTH), np.int32), split)
    lengths = jax.device_put(np.full(ROWS, WIDTH, np.int32), split)
    rows = jax.device_put(np.asarray(one.owners, np.int32), split)

    def first(weights: Any, tokens: Any, lengths: Any, rows: Any) -> Any:
        return prefill(weights, CONFIG, tokens, lengths, rows)

    def step(weights: Any, token: Any, position: Any, cache: Any, rows: Any) -> Any:
        rope = rope_tables(CONFIG, position[:, None])
        return decode_step(weights, CONFIG, token, position, rope, cache, jnp.int32(3), rows)

    lowered = jax.jit(first).lower(population, tokens, lengths, rows)
    found["prefill_text"] = collectives(lowered)
    _, cache = lowered.compile()(population, tokens, lengths, rows)
    cache = jax.device_put(cache, sharding.cache_sharding(CONFIG, mesh))
    found["cache_bytes"] = [on_device(cache), sum(x.nbytes for x in jax.tree.leaves(cache))]
    lowered = jax.jit(step, donate_argnums=3).lower(population, rows, lengths, cache, rows)
    found["decode_text"] = collectives(lowered)
    built = stack([one.weights] * CANDIDATES, roles(CONFIG))
    places = sharding.weight_sharding(CONFIG, mesh, built)
    found["stacked_bytes"] = [
        on_device(jax.device_put(built, places)),
        sum(x.nbytes for x in jax.tree.leaves(built)),
    ]
    return found


def difference(found: Any, expected: Any) -> float:
    """Largest absolute difference of two trees; infinite where one is infinite and one is not."""
    largest = 0.0
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
        differ = (a != b) & ~(np.isnan(a) & np.isnan(b))
        apart = np.abs(np.subtract(a, b, where=differ, out=np.zeros_like(a)))
        # Not Python's max, which drops a NaN.
        largest = float(np.maximum(largest, np.max(apart, initial=0.0)))
    return largest


def on_device(tree: Any) -> int:
    """Bytes on the first device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def collectives(lowered: Any) -> dict[str, int]:
    """Collective operations of a compiled program: "name shapes" -> how many."""
    names = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    pattern = re.compile(rf"= (.*?) ({names})(?:-start)?\(")
    found: Counter[str] = Counter()
    for line in lowered.compile().as_text().splitlines():
        if match := pattern.search(line):
            shapes = re.sub(r"\{[^}]*\}", "", match[1])
            found[f"{match[2]} {shapes}"] += 1
    return dict(found)


if __name__ == "__main__":
    reference = Reference(Path(sys.argv[1]))
    print(json.dumps({shape: on_mesh(shape, reference) for shape in sys.argv[2:]}))
