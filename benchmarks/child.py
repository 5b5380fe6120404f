"""Seconds to make one child with weights ready for use, against the published procedure.

    python benchmarks/child.py [--rounds 5] [--json FILE]

The models are written for the run: a bfloat16 base of about 134 million parameters and three
experts, once with task vectors of full rank and once of rank 64. Ours keeps base and basis in
memory and makes a child out of two parents' gains: crossover, mutation along one expert's
directions, weights, written over the last child's. The peer is the published procedure (Kuroki et
al., arXiv 2410.14735) in torch, in bfloat16: it loads two parents from disk, subtracts the base,
merges, and adds `U diag(Σ w) Vᵀ` with the factors of one expert's SVD, held in memory. It is timed
in three forms: as published (parents through `transformers`, the diagonal as a matrix), lean
(memory-mapped safetensors, columns scaled), which computes the same faster, and lean with float32
factors: a processor without bfloat16 arithmetic emulates it, and takes minutes for the first.

"Unbuilt" is the form in which children of low rank are decoded: no weights are made, the gains are
attached to the shared factors. All take turns; the median counts. The limit is the larger of
arithmetic (2 m n R operations a matrix, all three experts' directions) at the speed of one large
float32 product and of bytes (factors, base and child) at the speed of a copy, both measured in this
run. At full rank that is more than the peer needs in all: it adds the directions of one expert,
ours those of three in float32, since a gain of any of them may differ by then.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from measuring import copy_bandwidth, in_turns, matmul_rate, row, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from cycleqd_jax.merging.crossover import linear_crossover
from cycleqd_jax.merging.decomposition import factorise
from cycleqd_jax.merging.expert_svd import expert_svd_mutation
from cycleqd_jax.merging.spectral import (
    MatrixFactors,
    compile_materialise,
    decompose,
    expert_gains,
    gain_layout,
    is_factors,
)
from cycleqd_jax.merging.task_vector import task_vector
from cycleqd_jax.models.convert import load_model, save_model
from cycleqd_jax.models.kernels import attach
from cycleqd_jax.models.specs import LlamaConfig, leaf_table, roles

EXPERTS, STD, W_MAX = 3, 0.1, 0.1
CONFIG = LlamaConfig(
    vocab_size=32_000,
    hidden_size=768,
    intermediate_size=2048,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    dtype="bfloat16",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    disable_progress_bar()
    speed, bandwidth = matmul_rate(), copy_bandwidth()
    print(
        f"this machine: {speed / 1e9:.0f} GFLOP/s in float32, copies at {bandwidth / 1e9:.1f} GB/s"
    )
    rows = []
    for rank in (None, 64):
        with tempfile.TemporaryDirectory() as folder:
            new = compare(Path(folder), rank, options.rounds, speed, bandwidth)
        rows += new
        for found in new:
            print(
                f"{found['row']:24s} {found['ours']:7.3f} s   {found['peer_name']:24s} "
                f"{found['peer']:7.3f} s   ratio {found['ratio']:6.2f}   limit "
                f"{found['limit']:6.3f} s ({found['limit'] / found['ours']:.0%} reached)",
                flush=True,
            )
    write_rows(options.json, rows)


def compare(
    folder: Path, rank: int | None, rounds: int, speed: float, bandwidth: float
) -> list[dict[str, Any]]:
    base = make_models(folder, rank)
    basis, factors = decompose_experts(folder, base, rank)
    parents = [folder / f"expert{e}" for e in range(2)]
    halves = {name: tuple(part.bfloat16() for part in parts) for name, parts in factors.items()}
    peer, wide = (Peer(folder / "base", parents, held) for held in (halves, factors))
    ours = Ours(base, basis)
    for one in (peer, wide):
        check_agreement(ours, one)
    peers: dict[str, Callable[[], Any]] = {
        "torch, as published": lambda: peer.child(published=True),
        "torch, lean": lambda: peer.child(published=False),
        "torch, lean, float32": lambda: wide.child(published=False),
    }
    runs = {"ours": ours.child, "ours, unbuilt": ours.unbuilt, **peers}
    medians = {name: statistics.median(s) for name, s in in_turns(runs, rounds).items()}
    limit = max(operations(basis) / speed, bytes_moved(base, basis) / bandwidth)
    name = f"child, {f'rank {rank}' if rank else 'full rank'}"
    forms = [(name, "ours", limit)]
    if rank is not None:  # at full rank rows through the factors cost more than a built child
        copies = bytes_moved(base, basis) - 2.0 * sum(x.nbytes for x in jax.tree.leaves(base))
        forms.append((f"{name}, unbuilt", "ours, unbuilt", copies / bandwidth))
    return [
        row(title, medians[form], medians[peer_name], peer_name, "s", bound)
        for title, form, bound in forms
        for peer_name in peers
    ]


def make_models(folder: Path, rank: int | None) -> Any:
    """Write base, experts and, for the peer, two parents; return the base."""
    rng = np.random.default_rng(0)

    def weights(spec: Any) -> jax.Array:
        shape = spec.full_shape(CONFIG.num_layers)
        std = 0.0 if spec.init_std is None else spec.init_std
        values = std * rng.standard_normal(shape, np.float32) + (spec.init_std is None)
        return jnp.asarray(values, jnp.bfloat16)

    def changed(spec: Any, leaf: jax.Array) -> jax.Array:
        shape = spec.full_shape(CONFIG.num_layers)
        if spec.role == "vector" or rank is None:
            change = rng.standard_normal(shape, np.float32)
        else:
            *layers, m, n = shape
            left = rng.standard_normal((*layers, m, rank), np.float32)
            change = left @ rng.standard_normal((*layers, rank, n), np.float32) / rank**0.5
        return (leaf.astype(jnp.float32) + 0.002 * change).astype(jnp.bfloat16)

    table = leaf_table(CONFIG)
    base = jax.tree.map(weights, table)
    save_model(folder / "base", CONFIG, base)
    for e in range(EXPERTS):
        save_model(folder / f"expert{e}", CONFIG, jax.tree.map(changed, table, base))
    return base


def decompose_experts(folder: Path, base: Any, rank: int | None) -> tuple[Any, dict[str, Any]]:
    """Our basis, and for the peer the SVD of the last expert: name -> U, S, V in float32."""
    start = time.perf_counter()
    taus = [task_vector(load_model(folder / f"expert{e}")[1], base) for e in range(EXPERTS)]
    basis, report = decompose(taus, roles(CONFIG), rank, base=base)
    jax.block_until_ready(basis)
    print(
        f"decomposed {EXPERTS} experts in {time.perf_counter() - start:.1f} s; "
        f"least retained energy {report.minimum():.4f}"
    )
    factors: dict[str, Any] = {}
    for spec, tau in zip(
        jax.tree.leaves(leaf_table(CONFIG)), jax.tree.leaves(taus[-1]), strict=True
    ):
        if spec.role == "vector":
            continue
        stack = tau if spec.stacked else tau[None]
        u, v, _ = factorise(stack, np.zeros(stack.shape[0], np.float32), None)
        for layer, name in enumerate(spec.hf_names(CONFIG.num_layers)):
            factors[name] = triplets(u[layer], v[layer], spec.transpose)
    return basis, factors


def triplets(u: Any, v: Any, transpose: bool) -> tuple[torch.Tensor, ...]:
    """Directions ``u_i v_i^T`` of a matrix as U, S, V of the file's tensor, in float32."""
    sides = [torch.from_numpy(np.array(x)) for x in (u, v)]
    if transpose:
        sides.reverse()
    sizes = [torch.linalg.vector_norm(side, dim=0) for side in sides]
    left, right = (side / size for side, size in zip(sides, sizes, strict=True))
    return left.contiguous(), sizes[0] * sizes[1], right.contiguous()


class Ours:
    """Children of experts 0 and 1 in archive 2, each written over the last one."""

    def __init__(self, base: Any, basis: Any) -> None:
        self.base, self.basis = base, basis
        layout = gain_layout(basis)
        cross, mutate = linear_crossover(1.0, STD), expert_svd_mutation(layout, W_MAX)

        @jax.jit
        def breed(key: jax.Array, first: Any, second: Any) -> Any:
            crossing, mutating = jax.random.split(key)
            return mutate(mutating, cross(crossing, first, second), jnp.int32(2))

        self.breed = breed
        self.parents = [expert_gains(layout, e) for e in range(2)]
        self.build = compile_materialise(base, reuse=True)
        self.attach = jax.jit(attach)
        self.last = jax.tree.map(jnp.zeros_like, base)
        self.key = jax.random.key(0)

    def child(self) -> Any:
        self.key, key = jax.random.split(self.key)
        gains = self.breed(key, *self.parents)
        self.last = jax.block_until_ready(self.build(self.last, self.base, self.basis, gains))
        return self.last

    def unbuilt(self) -> Any:
        """The child as kernels for the decoder: gains on shared factors, in the base's dtype."""
        self.key, key = jax.random.split(self.key)
        gains = jax.tree.map(lambda g: g[None], self.breed(key, *self.parents))
        return jax.block_until_ready(self.attach(self.base, self.basis, gains))


class Peer:
    """The published procedure, from its description; the models stay Hugging Face folders.

    `parents` and `factors` may be set anew for every child.
    """

    def __init__(self, base: Path, parents: Sequence[Path], factors: dict[str, Any]) -> None:
        self.parents = parents
        self.factors = factors
        self.base = load_file(base / "model.safetensors")
        self.generator = torch.Generator().manual_seed(0)

    def child(self, published: bool) -> dict[str, torch.Tensor]:
        def scales(name: str, rank: int) -> torch.Tensor:
            drawn = torch.rand(rank, dtype=torch.bfloat16, generator=self.generator)
            return W_MAX * drawn

        weights = 1.0 + STD * torch.randn(2, generator=self.generator)
        return self.build(weights, scales, published)

    def build(
        self, weights: torch.Tensor, scales: Callable[[str, int], torch.Tensor], published: bool
    ) -> dict[str, torch.Tensor]:
        """A child of the parents' ``weights`` (2,), mutated by ``scales(tensor's name, rank)``."""
        if published:
            parents = [
                AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16).state_dict()
                for f in self.parents
            ]
        else:
            parents = [load_file(f / "model.safetensors") for f in self.parents]
        taus = [{k: p[k] - b for k, b in self.base.items()} for p in parents]
        child = {}
        for name, base in self.base.items():
            merged = sum(w * tau[name] for w, tau in zip(weights, taus, strict=True))
            child[name] = base + merged / weights.sum()
        for name, (u, s, v) in self.factors.items():
            scaled = scales(name, s.shape[0]) * s
            child[name] += u @ torch.diag_embed(scaled) @ v.T if published else (u * scaled) @ v.T
        return child


def check_agreement(ours: Ours, peer: Peer) -> None:
    """Both make the same child, up to the peer's bfloat16 arithmetic, for equal random numbers."""
    layout = gain_layout(ours.basis)
    blocks = [expert_gains(layout, e) for e in range(EXPERTS)]
    gains = jax.tree.map(lambda a, b, c: 0.5 * (a + b) + W_MAX * c, *blocks)
    vectors = jax.tree.map(lambda a, b, c: 0.5 * (a + b), *blocks)  # norms are not mutated
    gains = jax.tree.map(
        lambda role, g, plain: plain if role == "vector" else g, roles(CONFIG), gains, vectors
    )
    found = ours.build(jax.tree.map(jnp.zeros_like, ours.base), ours.base, ours.basis, gains)

    def constant(name: str, rank: int) -> torch.Tensor:
        return torch.full((rank,), W_MAX, dtype=torch.bfloat16)

    theirs = peer.build(torch.ones(2), constant, published=False)
    for spec, leaf, base in zip(
        *(jax.tree.leaves(tree) for tree in (leaf_table(CONFIG), found, ours.base)), strict=True
    ):
        name = spec.hf_names(CONFIG.num_layers)[0]
        one, start = (np.asarray(x[0] if spec.stacked else x, np.float32) for x in (leaf, base))
        if spec.transpose:
            one, start = one.T, start.T
        change = theirs[name].float().numpy() - start
        apart, size = np.linalg.norm(one - start - change), np.linalg.norm(change)
        if not apart <= 0.3 * size:
            raise SystemExit(f"{name}: children differ by {apart:.3g}, the change is {size:.3g}")


def operations(basis: Any) -> float:
    """Multiplications and additions of one child: 2 m n R a matrix."""
    return sum(2.0 * f.u.size * f.v.shape[-2] for f in _matrices(basis))


def bytes_moved(base: Any, basis: Any) -> float:
    """Factors and base read once, child written once."""
    factors = sum(f.u.nbytes + f.v.nbytes for f in _matrices(basis))
    return factors + 2.0 * sum(leaf.nbytes for leaf in jax.tree.leaves(base))


def _matrices(basis: Any) -> list[Any]:
    nodes = jax.tree.leaves(basis, is_leaf=is_factors)
    return [node for node in nodes if isinstance(node, MatrixFactors)]


if __name__ == "__main__":
    main()
