"""Evaluations per second of the loop against QDax, pyribs and NumPy; cost of a child at full size.

    python benchmarks/qd_loop.py [--json FILE] [--seconds 2] [--repetitions 5]
    python benchmarks/qd_loop.py --llama [--json FILE] [--pool 1200] [--dtype float32]

Three skills over 4 096 gains (three experts), 15 bins, batches of 256, everything in one process
and interleaved. The limit is what this machine allows for the bytes and random numbers of a child:
see `limit`. With ``--llama`` instead: `emit` and `add` of eager ask/tell at the size of
Llama-3-8B's gains, for more and more occupied cells; it needs as much memory as the pool.
"""

import argparse
import functools
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measuring import best_of, row, write_rows

from cycleqd_jax.merging.crossover import linear_crossover
from cycleqd_jax.merging.expert_svd import expert_svd_mutation
from cycleqd_jax.merging.layout import GainLayout, LeafLayout
from cycleqd_jax.qd.emitter import CycleQDEmitter
from cycleqd_jax.qd.grid import Grid, grid_from_experts, make_grid
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.qd.selection import EliteSelector

SKILLS, BINS, BATCH = 3, 15, 256
ALPHA_LOW, ALPHA_HIGH = 0.5, 0.8
MERGE_STD, W_MAX = 0.1, 0.1
LAYOUT = GainLayout(
    jax.tree.structure({"gains": 0}), (LeafLayout("matrix", (), (1366, 1365, 1365)),)
)
TREE = GainLayout(
    jax.tree.structure({"layers": 0, "output": 0}),
    (LeafLayout("matrix", (8,), (160,) * SKILLS), LeafLayout("matrix", (), (86, 85, 85))),
)
"""The peers breed one vector, so do we; the tree shows what stacked layers cost."""
OWNER = LAYOUT.leaves[0].owner
CORNERS = (np.arange(SKILLS)[:, None] == OWNER).astype(np.float32)
"""(K, gains): expert k, the best there is at skill k."""


def skills(*leaves: Any, corners: Any = (CORNERS,), xp: Any = jnp) -> Any:
    """``exp(-3 |x - corner_k|^2 / gains)`` for every row and skill, (B, K)."""
    distance = sum(corner.sum(axis=1) for corner in corners)
    for leaf, corner in zip(leaves, corners, strict=True):
        x = leaf.reshape(leaf.shape[0], -1)
        squares = jnp.sum(x * x, axis=1) if xp is jnp else np.einsum("ij,ij->i", x, x)
        distance = distance + squares[:, None] - 2.0 * (x @ corner.T)
    return xp.exp(-3.0 / OWNER.size * distance)


EXPERT_SCORES = skills(CORNERS, xp=np)
GRID: Callable[[], Grid] = functools.partial(grid_from_experts, EXPERT_SCORES, BINS)


def scan(algorithm: Any, repertoire: Any, state: Any) -> Callable[[int], int]:
    """Run generations inside one compiled scan that owns its carry."""

    @functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
    def generations(carry: Any, count: int) -> Any:
        return jax.lax.scan(algorithm.scan_update, carry, None, length=count)[0]

    carry = (repertoire, state, jax.random.key(1))

    def run(count: int) -> int:
        nonlocal carry
        carry = jax.block_until_ready(generations(carry, count))
        return count * BATCH

    run.compiled = generations  # type: ignore[attr-defined]
    run.carry = lambda: carry  # type: ignore[attr-defined]
    return run


def ours(layout: GainLayout = LAYOUT) -> Callable[[int], int]:
    from qdax.core.map_elites import MAPElites

    experts = jax.tree.map(lambda *x: jnp.stack(x), *map(layout.indicator, range(SKILLS)))
    corners = [np.asarray(x).reshape(SKILLS, -1) for x in jax.tree.leaves(experts)]

    def score(genotypes: Any, key: Any) -> Any:
        scores = skills(*jax.tree.leaves(genotypes), corners=corners)
        return scores, scores, {}

    emitter = CycleQDEmitter(
        EliteSelector(ALPHA_LOW, ALPHA_HIGH),
        linear_crossover(1.0, MERGE_STD),
        expert_svd_mutation(layout, W_MAX),
        BATCH,
        SKILLS,
    )
    algorithm = MAPElites(score, emitter, lambda repertoire: {}, CyclicRepertoire.init)
    repertoire, state, _ = algorithm.init(experts, GRID(), jax.random.key(0))
    return scan(algorithm, repertoire, state)


def qdax_iso_line() -> Callable[[int], int]:
    """Plain QDax: one archive, uniform selection, iso+line variation."""
    from qdax.core.emitters.mutation_operators import isoline_variation
    from qdax.core.emitters.standard_emitters import MixingEmitter
    from qdax.core.map_elites import MAPElites

    def score(genotypes: Any, key: Any) -> Any:
        scores = skills(genotypes)
        return scores[:, 0], scores[:, 1:], {}

    variation = functools.partial(isoline_variation, iso_sigma=0.05, line_sigma=0.1)
    emitter = MixingEmitter(lambda x, key: (x, key), variation, 1.0, BATCH)
    algorithm = MAPElites(score, emitter, lambda repertoire: {})
    repertoire, state, _ = algorithm.init(
        jnp.asarray(CORNERS), GRID().centroids(0), jax.random.key(0)
    )
    return scan(algorithm, repertoire, state)


def pyribs() -> Callable[[int], int]:
    """Three ``GridArchive`` and a ``GaussianEmitter`` for each, taking turns; all three are fed."""
    from ribs.archives import GridArchive
    from ribs.emitters import GaussianEmitter

    grid = GRID()
    ranges = list(zip(np.asarray(grid.lower), np.asarray(grid.upper), strict=True))
    others = [[i for i in range(SKILLS) if i != k] for k in range(SKILLS)]
    archives = [
        GridArchive(
            solution_dim=OWNER.size,
            dims=[BINS] * (SKILLS - 1),
            ranges=[ranges[i] for i in others[k]],
            dtype=np.float32,
            seed=k,
        )
        for k in range(SKILLS)
    ]
    emitters = [
        GaussianEmitter(archives[k], sigma=0.05, x0=CORNERS[k], batch_size=BATCH, seed=k)
        for k in range(SKILLS)
    ]
    generation = 0

    def offer(children: np.ndarray) -> None:
        scores = skills(children, xp=np)
        for k in range(SKILLS):
            archives[k].add(children, scores[:, k], scores[:, others[k]])

    offer(CORNERS)

    def run(count: int) -> int:
        nonlocal generation
        for _ in range(count):
            offer(emitters[generation % SKILLS].ask())
            generation += 1
        return count * BATCH

    return run


class NumpyLoop:
    """The published rules in NumPy; each archive keeps its elites' genotypes.

    ``run_published`` breeds child by child as the published loop does, with whole arrays for
    everything inside a child; ``run_batched`` has whole arrays for a batch, too.
    """

    def __init__(self) -> None:
        grid = GRID()
        self.rng = np.random.default_rng(0)
        self.edges = np.asarray(grid.edges)
        cells = BINS ** (SKILLS - 1)
        self.genotypes = np.zeros((SKILLS, cells, OWNER.size), np.float32)
        self.scores = np.full((SKILLS, cells, SKILLS), -np.inf, np.float32)
        self.others = [[i for i in range(SKILLS) if i != k] for k in range(SKILLS)]
        self.blocks = [np.flatnonzero(e == OWNER) for e in range(SKILLS)]
        self.generation = 0
        self.insert(CORNERS.copy(), EXPERT_SCORES)

    def weights(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Occupied cells of archive k and ``gamma`` of each."""
        cells = np.flatnonzero(self.scores[k, :, k] > -np.inf)
        scores = self.scores[k, cells]
        low, high = scores.min(axis=0), scores.max(axis=0)
        norm = (scores - low) / np.where(high > low, high - low, 1.0)
        return cells, np.prod(ALPHA_LOW + norm * (ALPHA_HIGH - ALPHA_LOW), axis=1)

    def bins(self, scores: np.ndarray) -> np.ndarray:
        return np.stack(
            [np.searchsorted(self.edges[i], scores[..., i]) for i in range(SKILLS)], axis=-1
        )

    def run_published(self, count: int) -> int:
        for _ in range(count):
            k = self.generation % SKILLS
            for _ in range(BATCH):
                cells, gamma = self.weights(k)
                pair = cells[np.argsort(np.log(gamma) + self.rng.gumbel(size=gamma.size))[-2:]]
                first, second = self.genotypes[k, pair[-1]], self.genotypes[k, pair[0]]
                w = self.rng.normal(1.0, MERGE_STD, 2).astype(np.float32)
                child = (w[0] * first + w[1] * second) / w.sum()
                block = self.blocks[k]
                child[block] += np.float32(W_MAX) * self.rng.random(block.size, np.float32)
                scores = skills(child[None], xp=np)[0]
                bins = self.bins(scores)
                for j in range(SKILLS):
                    cell = 0
                    for i in self.others[j]:
                        cell = cell * BINS + int(bins[i])
                    if scores[j] > self.scores[j, cell, j]:
                        self.scores[j, cell] = scores
                        self.genotypes[j, cell] = child
            self.generation += 1
        return count * BATCH

    def run_batched(self, count: int) -> int:
        for _ in range(count):
            k = self.generation % SKILLS
            cells, gamma = self.weights(k)
            noise = np.log(gamma) + self.rng.gumbel(size=(BATCH, gamma.size))
            order = np.argsort(noise, axis=1)
            pairs = cells[order[:, [-1, -min(2, cells.size)]]]
            w = self.rng.normal(1.0, MERGE_STD, (BATCH, 2)).astype(np.float32)
            w /= w.sum(axis=1, keepdims=True)
            children = w[:, :1] * self.genotypes[k, pairs[:, 0]]
            children += w[:, 1:] * self.genotypes[k, pairs[:, 1]]
            block = self.blocks[k]
            step = np.float32(W_MAX) * self.rng.random((BATCH, block.size), np.float32)
            children[:, block] += step
            self.insert(children, skills(children, xp=np))
            self.generation += 1
        return count * BATCH

    def insert(self, children: np.ndarray, scores: np.ndarray) -> None:
        bins = self.bins(scores)
        for k in range(SKILLS):
            cell = np.ravel_multi_index(tuple(bins[:, self.others[k]].T), (BINS,) * (SKILLS - 1))
            order = np.argsort(-scores[:, k], kind="stable")
            taken, first = np.unique(cell[order], return_index=True)
            best = order[first]
            better = scores[best, k] > self.scores[k, taken, k]
            self.scores[k, taken[better]] = scores[best[better]]
            self.genotypes[k, taken[better]] = children[best[better]]


def limit(acceptance: float) -> dict[str, float]:
    """What one child costs at least, over what this machine moves and draws.

    Both parents are read, the child is written, read once to be scored, and read and written again
    if it is accepted; one number is drawn for every gain of an expert, two for the parents, two
    for the merge weights. Memory and arithmetic may overlap, so the slower of the two counts. The
    bandwidth is that of arrays as big as a batch, which caches may hold; the threefry rate is that
    of ``jax.random.bits`` for as many numbers as a batch needs.
    """
    bytes_moved = OWNER.size * 4 * (2 + 1 + 1 + 2 * acceptance)
    numbers = max(LAYOUT.leaves[0].ranks) + 4
    x = jnp.ones((2, BATCH, OWNER.size), jnp.float32)
    draws = BATCH * numbers

    @functools.partial(jax.jit, donate_argnums=0)
    def triad(x: Any) -> Any:
        return jax.lax.fori_loop(0, 100, lambda _, y: y * 0.5 + 1.0, x)

    @jax.jit
    def bits(key: Any) -> Any:
        def body(key: Any, _: Any) -> Any:
            key, use = jax.random.split(key)
            return key, jax.random.bits(use, (draws,))[-1]

        return jax.lax.scan(body, key, None, length=50)

    def seconds(call: Callable[[], Any]) -> float:
        return best_of(4, lambda: jax.block_until_ready(call()))

    def move() -> Any:
        nonlocal x
        x = triad(x)
        return x

    bandwidth = 100 * 2 * x.nbytes / seconds(move)
    rate = 50 * draws / seconds(lambda: bits(jax.random.key(0)))
    return {
        "bytes": bytes_moved,
        "numbers": numbers,
        "bandwidth": bandwidth,
        "threefry": rate,
        "per_second": 1.0 / max(bytes_moved / bandwidth, numbers / rate),
    }


def interleaved(
    loops: dict[str, Callable[[int], int]], seconds: float, repetitions: int
) -> dict[str, list[float]]:
    """Evaluations per second of each loop, one repetition of each after the other."""
    counts = {}
    for name, run in loops.items():
        for count in (2, 10):
            run(count)
        start = time.perf_counter()
        run(10)
        counts[name] = max(10, int(10 * seconds / (time.perf_counter() - start)))
        run(counts[name])
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(repetitions):
        for name, run in loops.items():
            start = time.perf_counter()
            children = run(counts[name])
            rates[name].append(children / (time.perf_counter() - start))
    return rates


def compare(seconds: float, repetitions: int) -> list[dict[str, Any]]:
    """The rows of ours against each peer."""
    mine, published = ours(), NumpyLoop()
    loops = {
        "ours": mine,
        "QDax MAPElites, iso+line, one archive": qdax_iso_line(),
        "pyribs GridArchive x 3, Gaussian emitter": pyribs(),
        "NumPy, published loop": published.run_published,
        "NumPy, whole batches": NumpyLoop().run_batched,
        "ours, two leaves, one of 8 layers": ours(TREE),
    }
    rates = {n: statistics.median(r) for n, r in interleaved(loops, seconds, repetitions).items()}
    bound = limit(acceptance(mine))
    speed = rates.pop("ours")
    print(
        f"a child: {bound['bytes'] / 1e3:.0f} kB at {bound['bandwidth'] / 1e9:.1f} GB/s, "
        f"{bound['numbers']:.0f} random numbers at {bound['threefry'] / 1e6:.0f} M/s; "
        f"limit {bound['per_second']:.0f} evaluations/s, {speed / bound['per_second']:.0%} reached"
    )
    print("coverage " + " ".join(f"{c:.0%}" for c in coverage(mine)))
    return [
        row(
            f"qd loop against {name}",
            speed,
            rate,
            name,
            "evaluations/s",
            bound["per_second"],
            more_is_better=True,
        )
        for name, rate in rates.items()
    ]


def coverage(run: Any) -> list[float]:
    cells = np.asarray(run.carry()[0].cells)
    return [float(c) for c in (cells >= 0).mean(axis=1)]


def acceptance(run: Any) -> float:
    """Share of the children of one more generation that enter an archive."""
    before = np.asarray(run.carry()[0].cells), np.asarray(run.carry()[0].scores)
    held = {tuple(row) for row in before[1][np.unique(before[0][before[0] >= 0])]}
    run(2)
    after = np.asarray(run.carry()[0].cells), np.asarray(run.carry()[0].scores)
    rows = {tuple(row) for row in after[1][np.unique(after[0][after[0] >= 0])]}
    return len(rows - held) / (2 * BATCH)


def llama_layout() -> GainLayout:
    """Gains of Llama-3-8B (32 layers, 4 096 wide) with three full-rank experts."""
    layers, wide, narrow = 32, 4096, 1024
    ranks = {"q": wide, "k": narrow, "v": narrow, "o": wide, "gate": wide, "up": wide, "down": wide}
    leaves = {n: LeafLayout("matrix", (layers,), (r,) * SKILLS) for n, r in ranks.items()}
    leaves |= {n: LeafLayout("matrix", (), (wide,) * SKILLS) for n in ("embedding", "head")}
    leaves |= {n: LeafLayout("vector", (layers,), (1,) * SKILLS) for n in ("norm1", "norm2")}
    leaves["norm"] = LeafLayout("vector", (), (1,) * SKILLS)
    names = sorted(leaves)
    return GainLayout(jax.tree.structure(dict.fromkeys(names, 0)), tuple(leaves[n] for n in names))


def llama(pool: int, dtype: str, batch: int, repetitions: int) -> list[dict[str, Any]]:
    """Cost of a child's `emit` and `add` for more and more occupied cells of one pool."""
    layout = llama_layout()
    bins = int(np.sqrt(pool // SKILLS))
    grid = make_grid([0.0] * SKILLS, [1.0] * SKILLS, bins)
    emitter = CycleQDEmitter(
        EliteSelector(), linear_crossover(), expert_svd_mutation(layout, W_MAX), batch, SKILLS
    )
    expert = jax.tree.map(lambda x: x[None].astype(dtype), layout.indicator(0))
    scores = jnp.full((1, SKILLS), 0.5)
    repertoire = CyclicRepertoire.init(expert, scores, scores, grid, capacity=pool, in_place=True)
    megabytes = sum(x.nbytes for x in jax.tree.leaves(expert)) / 1e6
    print(
        f"{layout.size} gains a genotype, {dtype}, {megabytes:.1f} MB; a pool of {pool}: "
        f"{megabytes * pool / 1e3:.1f} GB, {SKILLS} x {bins**2} cells, batches of {batch}"
    )
    rng = np.random.default_rng(0)
    state = emitter.init(jax.random.key(0), repertoire, None, None, None, {})
    sizes = sorted({min(n, repertoire.cells.size) for n in (10, 100, 600, 1200)})
    times: dict[int, list[tuple[float, float]]] = {n: [] for n in sizes}
    for generation in range(repetitions + 2):
        for occupied in sizes:
            cells = np.full(repertoire.cells.size, -1, np.int32)
            cells[rng.permutation(cells.size)[:occupied]] = rng.permutation(pool)[:occupied]
            held = rng.uniform(0.2, 0.8, (pool, SKILLS)).astype(np.float32)
            repertoire = repertoire.replace(
                cells=jnp.asarray(cells.reshape(SKILLS, -1)), scores=jnp.asarray(held)
            )
            # Every second child is the best of its cell in archive 0, the others never enter.
            offered = np.full((batch, SKILLS), np.nan, np.float32)
            offered[::2, 0] = 2.0
            offered[::2, 1:] = rng.uniform(0.0, 1.0, (len(offered[::2]), SKILLS - 1))
            scores = jax.block_until_ready(jnp.asarray(offered))
            start = time.perf_counter()
            children, _ = emitter.emit(repertoire, state, jax.random.key(generation))
            jax.block_until_ready(children)
            emitted = time.perf_counter()
            repertoire = jax.block_until_ready(repertoire.add(children, scores, scores))
            times[occupied].append((emitted - start, time.perf_counter() - emitted))
    rows, first = [], 0.0
    for occupied in sizes:
        # The first two rounds compile and touch the memory.
        emit, add = (
            1e3 * statistics.median(t) / batch for t in zip(*times[occupied][2:], strict=True)
        )
        first = first or emit + add
        print(f"{occupied:5d} occupied cells: emit {emit:7.2f} ms, add {add:7.2f} ms a child")
        rows.append(
            row(
                f"emit + add, {layout.size} gains, {dtype}, {occupied} of {pool} occupied",
                emit + add,
                first,
                f"ours at {sizes[0]} occupied cells",
                "ms a child",
            )
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory of the process {peak:.1f} GB")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--llama", action="store_true")
    parser.add_argument("--pool", type=int, default=1200)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=16, help="children a generation (--llama)")
    options = parser.parse_args(arguments)
    if options.llama:
        rows = llama(options.pool, options.dtype, options.batch, options.repetitions)
    else:
        rows = compare(options.seconds, options.repetitions)
        for found in rows:
            print(
                f"{found['peer_name']:42s} {found['peer']:9.0f}/s   "
                f"ours {found['ours']:9.0f}/s   ratio {found['ratio']:.2f}"
            )
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
