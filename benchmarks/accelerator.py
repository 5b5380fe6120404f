"""All rows that need an accelerator, in one run of less than eight minutes on one GPU.

    python benchmarks/accelerator.py [--json FILE] [--rows child,decode,decompose,qd] [--smoke]

- child: crossover, mutation and weights of one child at Llama-3-8B's shapes, three full-rank
  experts in bfloat16 (97 GB: an H200 or larger), against the bar of 0.30 s.
- decode: 32 candidates x 8 rows at those shapes, rank 256 an expert, against `transformers`,
  candidate after candidate, whose weights it gets for nothing; and one decoding step against the
  memory-bandwidth limit. A step has to read the weights and the factors once (of the input
  embeddings only the tokens' rows) and the filled part of the cache; that over the published
  bandwidth of the chip is the limit, and the bar is to reach 60% of it.
- decompose: matrices of 4096 x 4096 against `torch.linalg.svd` on the same device.
- qd: evaluations a second of the loop against QDax, and emit + add at the size of Llama-3-8B's
  gains.

Every row is a process of its own, so that one's memory is not another's, and one that fails leaves
the others. `--smoke` runs the same code at tiny shapes on any machine; its figures mean nothing.
torch has to see the accelerator too (a CUDA build), or the rows against it fail and say so.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measuring import Row, read_bandwidth, row, timed, write_rows

from cycleqd_jax.chips import chip_of
from cycleqd_jax.merging.decomposition import factorise
from cycleqd_jax.merging.spectral import MatrixFactors
from cycleqd_jax.models import kernels
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.generate import Decoder
from cycleqd_jax.models.programs import STEPS
from cycleqd_jax.models.specs import LeafSpec, leaf_table
from cycleqd_jax.plan import make_plan
from cycleqd_jax.sharding import make_mesh
from cycleqd_jax.workload import MODELS, Workload, abstract_arrays

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the other benchmarks, as `benchmarks.child`

BUDGET = 480.0
CHILD_BAR, BANDWIDTH_BAR, DECODE_BAR = 0.30, 0.60, 8.0
PACKAGES = ("jax", "jaxlib", "torch", "transformers")
TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=256,
    pad_id=0,
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any machine")
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        rows = [{**row, **circumstances()} for row in ROWS[options.one](options.smoke)]
        options.json.write_text(json.dumps(rows))
        return 0
    names = options.rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"unknown rows {', '.join(unknown)}: expected some of {', '.join(ROWS)}")
    start = time.perf_counter()
    rows, failed = [], []
    for name in names:
        left = BUDGET - (time.perf_counter() - start)
        try:
            rows += in_process(name, options.smoke, left)
        except RuntimeError as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
    print(table(rows))
    print(f"{time.perf_counter() - start:.0f} s in all")
    write_rows(options.json, rows)
    return 1 if failed else 0


def in_process(name: str, smoke: bool, seconds: float) -> list[Row]:
    """Run one row in a process of its own. Raises RuntimeError where it gives no result."""
    if seconds <= 0:
        raise RuntimeError(f"no time left of {BUDGET:.0f} s")
    # Row by row what it can take; torch needs its part of the memory beside JAX.
    share = {"child": "0.95"}.get(name, "0.6")
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": share}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--one", name, "--json", str(result)]
        command += ["--smoke"] if smoke else []
        try:
            done = subprocess.run(
                command,
                env=environment,
                timeout=seconds,
                check=False,
                stdout=sys.stderr,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"stopped after {seconds:.0f} s") from None
        if done.returncode:
            raise RuntimeError(f"ended with status {done.returncode}, see above")
        return json.loads(result.read_text())


def circumstances() -> Row:
    """Chip, versions and date, without which a figure says nothing."""
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    versions = {name: found.get(name) for name in PACKAGES}
    return {
        "device": jax.devices()[0].device_kind,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'row':44s} {'ours':>10s} {'peer':>10s} {'ratio':>7s} {'limit':>10s}  unit, peer"]
    for found in rows:
        limit = f"{found['limit']:10.4g}" if found["limit"] is not None else f"{'':10s}"
        lines.append(
            f"{found['row']:44s} {found['ours']:10.4g} {found['peer']:10.4g} "
            f"{found['ratio']:7.2f} {limit}  {found['unit']}, {found['peer_name']}"
        )
    return "\n".join(lines)


def child_row(smoke: bool) -> list[Row]:
    from benchmarks.child import Ours, operations

    config = TINY if smoke else MODELS["llama3-8b"]
    arrays = abstract_arrays(config, make_mesh("1x1", jax.devices()[:1]), Workload(rank=None))
    ours = Ours(filled(arrays.params), filled(arrays.basis))
    ours.child()
    own = statistics.median(timed(ours.child) for _ in range(2 if smoke else 5))
    chip = chip_of(jax.devices()[0].device_kind)
    limit = operations(ours.basis) / chip.flops if chip else None
    return [row("child, 3 full-rank experts", own, CHILD_BAR, "bar", "s", limit)]


def decode_rows(smoke: bool) -> list[Row]:
    config = TINY if smoke else MODELS["llama3-8b"]
    work = Workload(rank=256, candidates=32, prompts=8, prompt=128, new=128)
    if smoke:
        work = Workload(rank=4, candidates=4, prompts=2, prompt=16, new=24)
    mesh = make_mesh("1x1", jax.devices()[:1])
    population = filled(abstract_arrays(config, mesh, work).decoded)
    rng = np.random.default_rng(0)
    # Of equal length, so that transformers does nothing for padding.
    prompts = rng.integers(1, config.vocab_size, (work.prompts, work.prompt)).tolist()
    decoder = Decoder(
        None, config, stop_tokens=[], pad_token=0, max_new_tokens=work.new, mode="rows", workers=1
    )
    texts, rows = prompts * work.candidates, np.repeat(np.arange(work.candidates), work.prompts)

    def ours() -> list[list[int]]:
        return decoder.decode(texts, rows.tolist(), params=population)

    found = ours()
    own = min(timed(ours) for _ in range(2))
    stream = decoder.open(population)
    stream.submit(texts, rows.tolist())
    stream.step()
    chunks = []
    while stream.pending:
        chunks.append(timed(stream.step))
    # Some chunks follow a change of the cache's size; the median one does not.
    step = statistics.median(chunks) / STEPS

    peer, theirs = 0.0, []
    for seconds, answers in transformers_texts(config, population, prompts, work):
        peer += seconds
        theirs += answers
    agreement = float(np.mean(np.asarray(found) == np.asarray(theirs)))
    if config.dtype == "float32" and agreement < 1.0:
        raise SystemExit(f"decode: {agreement:.1%} of the tokens are those of transformers")

    chip = chip_of(jax.devices()[0].device_kind)
    bandwidth = chip.bandwidth if chip else read_bandwidth()
    plan = make_plan(config, mesh, work)
    limit = plan.bytes_read["decode"] / work.new / bandwidth
    title = f"rank {work.rank} x {work.experts}"
    size = f"{work.candidates} x {work.prompts} rows"
    whole = sum(plan.bytes_read.values()) / bandwidth
    return [
        row(
            f"decode, {size}, {title}",
            own,
            peer,
            "transformers.generate",
            "s",
            whole,
            bar=DECODE_BAR,
            agreement=agreement,
        ),
        row(
            f"decode step, {size}, {title}",
            1e3 * step,
            1e3 * limit / BANDWIDTH_BAR,
            f"bar: {BANDWIDTH_BAR:.0%} of the bandwidth limit",
            "ms",
            1e3 * limit,
            share_of_limit=limit / step,
        ),
    ]


def transformers_texts(
    config: LlamaConfig, population: Any, prompts: list[list[int]], work: Workload
) -> Iterator[tuple[float, list[list[int]]]]:
    """Seconds and greedy texts of `generate` for one candidate after the other."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = torch_device()
    hf = config.to_hf()
    settings = AutoConfig.for_model(hf.pop("model_type"), **hf)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            settings, dtype=getattr(torch, config.dtype)
        ).eval()
        ids = torch.tensor(prompts)
    weights = model.state_dict()
    table = leaf_table(config)
    build = jax.jit(kernels.materialise_candidate)

    def put(spec: LeafSpec, name: str, node: Any, candidate: int) -> None:
        values = torch.from_dlpack(jax.block_until_ready(build(node, candidate)))
        weights[name].copy_(values.T if spec.transpose else values)

    def generate() -> list[list[int]]:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=work.new,
                min_new_tokens=work.new,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[:, work.prompt :].tolist()

    generate()
    for candidate in range(work.candidates):
        with torch.no_grad():
            for spec, node in zip(
                jax.tree.leaves(table.replace(layers=None)),
                jax.tree.leaves(population.replace(layers=None), is_leaf=kernels.is_kernel),
                strict=True,
            ):
                put(spec, spec.hf_name, node, candidate)
            for number, layer in enumerate(population.layers):
                nodes = jax.tree.leaves(layer, is_leaf=kernels.is_kernel)
                for spec, node in zip(jax.tree.leaves(table.layers), nodes, strict=True):
                    put(spec, spec.hf_name.format(layer=number), node, candidate)
        start = time.perf_counter()
        texts = generate()
        yield time.perf_counter() - start, texts


def decompose_rows(smoke: bool) -> list[Row]:
    import torch

    from benchmarks.decompose import Case, task_vectors

    side, rank = (64, 8) if smoke else (4096, 256)
    tau = task_vectors(Case("square", (2, side, side), 3.0, None, ()))
    on_jax, on_torch = jnp.asarray(tau), torch.from_numpy(tau).to(torch_device())
    floor = np.zeros(2, np.float32)

    def peer() -> None:
        torch.linalg.svd(on_torch, full_matrices=False)
        if on_torch.is_cuda:
            torch.cuda.synchronize()

    peer()
    theirs = min(timed(peer) for _ in range(2))
    rows = []
    for title, kept, method in (("full rank", None, "gram"), (f"rank {rank}", rank, "randomized")):

        def ours(kept: int | None = kept, method: Any = method) -> Any:
            return jax.block_until_ready(factorise(on_jax, floor, kept, method=method))

        error = float(np.max(ours()[2]))
        own = min(timed(ours) for _ in range(2))
        rows.append(
            row(
                f"{method}, 2 x {side}^2, {title}",
                own,
                theirs,
                "torch.linalg.svd",
                "s",
                error=error,
            )
        )
    return rows


def qd_rows(smoke: bool) -> list[Row]:
    from benchmarks import qd_loop

    seconds, repetitions = (0.01, 1) if smoke else (2.0, 3)
    loops = {"ours": qd_loop.ours(), "QDax": qd_loop.qdax_iso_line()}
    rates = qd_loop.interleaved(loops, seconds, repetitions)
    own, peer = (statistics.median(rates[name]) for name in loops)
    found = [
        row(
            "qd loop",
            own,
            peer,
            "QDax MAPElites, iso+line, one archive",
            "evaluations/s",
            more_is_better=True,
        )
    ]
    return found if smoke else found + qd_loop.llama(1200, "float32", 16, 5)


ROWS: dict[str, Callable[[bool], list[Row]]] = {
    "child": child_row,
    "decode": decode_rows,
    "decompose": decompose_rows,
    "qd": qd_rows,
}


def filled(shapes: Any) -> Any:
    """Random arrays in place of shapes, of the scale of real weights.

    One random layer is repeated where many are stacked: times do not depend on it, and memory for
    the random bits of all of them at once may not be there.
    """
    draw = jax.jit(draw_leaf, static_argnums=(1, 2, 3))
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))

    def array(leaf: Any, scale: float) -> jax.Array:
        return draw(next(keys), leaf.shape, leaf.dtype, scale)

    def node(value: Any) -> Any:
        if isinstance(value, MatrixFactors):
            return value.replace(u=array(value.u, 0.01), v=array(value.v, 1.0))
        if isinstance(value, kernels.SpectralKernel):
            width = value.base.shape[0] ** -0.5
            part = 0.3 * width * value.u.shape[-1] ** -0.5
            return value.replace(
                base=array(value.base, width),
                u=array(value.u, part),
                v=array(value.v, 1.0),
                gain=array(value.gain, 1.0),
            )
        return jax.tree.map(lambda leaf: array(leaf, 0.02), value)

    def special(value: Any) -> bool:
        return isinstance(value, MatrixFactors) or kernels.is_kernel(value)

    return jax.tree.map(node, shapes, is_leaf=special)


def draw_leaf(key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: float) -> jax.Array:
    one = scale * jax.random.normal(key, shape[-2:], jnp.float32)
    return jnp.broadcast_to(one.astype(dtype), shape)


def torch_device() -> str:
    """Where torch works; raises SystemExit where it does not see JAX's accelerator."""
    import torch

    if jax.default_backend() == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} sees no accelerator, JAX has "
            f"{jax.devices()[0].device_kind}: install torch with CUDA"
        )
    return "cuda"


if __name__ == "__main__":
    raise SystemExit(main())
