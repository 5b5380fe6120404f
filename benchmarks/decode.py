"""Decoding a population: rows of all candidates together, each candidate alone, transformers.

    python benchmarks/decode.py [--rank 16] [--candidates 16] [--tokens 96] [--json FILE]

A Llama of 24.6 million parameters (float32), three experts of the given rank each, and 4 prompts of
17 to 32 tokens per candidate. All three decode the same greedy texts, which is checked token by
token. "Alone" is what our own decoder does with one candidate after the other, its weights built
(time included), or with one candidate on each core; `transformers.generate` gets its weights for
nothing. The best of a few repetitions counts, in turns, so that a busy moment hits all alike.

The limit adds up what cannot be avoided: a step's arithmetic at the rate of a large product, or the
reading of weights and filled cache at the memory's speed, whichever takes longer. Both rates are
measured in the same run.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measuring import matmul_rate, read_bandwidth, row, write_rows

from cycleqd_jax.merging.spectral import MatrixFactors, VectorFactors
from cycleqd_jax.models import kernels
from cycleqd_jax.models.cache import unstack_layers
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import save_model
from cycleqd_jax.models.generate import Decoder
from cycleqd_jax.models.specs import LeafSpec, leaf_table

EXPERTS = 3
PROMPT_LENGTHS = (17, 22, 27, 32)
CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1408,
    num_layers=8,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    tie_embeddings=True,
    max_positions=512,
    pad_id=0,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=16, help="of each of the three experts")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--without-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    count, new = options.candidates, options.tokens

    attached = population(options.rank, count)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(1, CONFIG.vocab_size, length).tolist() for length in PROMPT_LENGTHS]
    rows = prompts * count
    candidates = [c for c in range(count) for _ in prompts]

    def ours(mode: str, workers: int | None) -> Callable[[], list[list[int]]]:
        decoder = Decoder(
            None,
            CONFIG,
            stop_tokens=[],
            pad_token=0,
            max_new_tokens=new,
            max_rows=len(rows),
            mode=mode,
            workers=workers,
        )
        return lambda: decoder.decode(rows, candidates, params=attached)

    contenders = {
        "rows": ours("rows", None),
        "rows, one batch": ours("rows", 1),
        "alone": ours("candidates", 1),
        "alone, one per core": ours("candidates", None),
    }
    if not options.without_peer:
        contenders["transformers"] = transformers_generate(attached, prompts, count, new)
    texts = {name: run() for name, run in contenders.items()}
    seconds = dict.fromkeys(contenders, float("inf"))
    for _ in range(options.repetitions):
        for name, run in contenders.items():
            start = time.perf_counter()
            again = run()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
            assert again == texts[name], f"{name} gives another text when run again"
    for name, text in texts.items():
        differ = sum(a != b for a, b in zip(text, texts["rows"], strict=True))
        assert not differ, f"{name}: {differ} of {len(rows)} texts differ from those of rows"

    best = min(seconds["rows"], seconds["rows, one batch"])
    rate, bandwidth = matmul_rate(), read_bandwidth()
    limit = limit_seconds(attached, len(rows), new, rate, bandwidth)
    share = kernels.spectral_share(attached)
    print(f"{len(rows)} rows of {count} candidates, {new} tokens each, rank {options.rank} x 3")
    print(f"low-rank products add {share:.0%} to the multiplications; all tokens are identical")
    for name, value in seconds.items():
        print(f"{name:22s} {value:7.2f} s   {len(rows) * new / value:7.0f} tokens/s")
    print(
        f"limit {limit:.2f} s ({rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s): "
        f"{limit / best:.0%} of it reached"
    )
    peers = {
        "each candidate alone": seconds["alone"],
        "each candidate alone, one per core": seconds["alone, one per core"],
    }
    if "transformers" in seconds:
        peers["transformers.generate"] = seconds["transformers"]
    measured = [
        row(f"decode population, rank {options.rank}", best, peer, name, "s", limit)
        for name, peer in peers.items()
    ]
    for found in measured:
        print(f"{found['ratio']:.2f} times as fast as {found['peer_name']}")
    write_rows(options.json, measured)


def population(rank: int, candidates: int) -> Any:
    """A random model whose candidates differ by a few percent of the weights, ready to decode."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def base(spec: LeafSpec) -> np.ndarray:
        shape = spec.full_shape(CONFIG.num_layers)
        if spec.init_std is None:
            return np.ones(shape, np.float32)
        return np.float32(spec.init_std) * normal(*shape)

    def factors(spec: LeafSpec) -> MatrixFactors | VectorFactors:
        lead = (CONFIG.num_layers,) if spec.stacked else ()
        if spec.role == "vector":
            return VectorFactors(delta=0.02 * normal(*lead, EXPERTS, *spec.shape))
        assert spec.init_std is not None
        scale = np.float32(0.3 * spec.init_std / np.sqrt(EXPERTS * rank))
        u, v = (normal(*lead, side, EXPERTS * rank) for side in spec.shape)
        return MatrixFactors(u=scale * u, v=v, ranks=(rank,) * EXPERTS)

    def gains(spec: LeafSpec) -> np.ndarray:
        lead = (candidates, CONFIG.num_layers) if spec.stacked else (candidates,)
        width = EXPERTS if spec.role == "vector" else EXPERTS * rank
        return rng.random((*lead, width)).astype(np.float32)

    table = leaf_table(CONFIG)
    trees = [jax.tree.map(leaf, table) for leaf in (base, factors, gains)]
    return unstack_layers(jax.jit(kernels.attach)(*trees))


def transformers_generate(
    attached: Any, prompts: list[list[int]], candidates: int, tokens: int
) -> Callable[[], list[list[int]]]:
    """Greedy `generate` of all prompts of a candidate in one batch, candidate after candidate."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    models = []
    for candidate in range(candidates):
        params = jax.jit(kernels.materialise_candidate)(attached, candidate)
        stacked = params.replace(layers=jax.tree.map(lambda *leaf: jnp.stack(leaf), *params.layers))
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder) / "model", CONFIG, stacked)
            model = LlamaForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
        models.append(model.eval())
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    def generate() -> list[list[int]]:
        texts = []
        for model in models:
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            texts += out[:, width:].tolist()
        return texts

    return generate


def limit_seconds(attached: Any, rows: int, tokens: int, rate: float, bandwidth: float) -> float:
    """The time of the arithmetic, or of the reading, of a prefill and `tokens - 1` steps."""
    matrices = [
        node
        for node in jax.tree.leaves(attached, is_leaf=kernels.is_kernel)
        if isinstance(node, kernels.SpectralKernel)
    ]
    numbers = sum(node.base.size + node.u.size + node.v.size for node in matrices)
    step_flops = 2 * numbers * rows
    token_bytes = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    filled = np.mean(PROMPT_LENGTHS) + tokens / 2
    step_bytes = 4 * numbers + rows * filled * token_bytes
    step = max(step_flops / rate, step_bytes / bandwidth)
    return float(step_flops * np.mean(PROMPT_LENGTHS) / rate + (tokens - 1) * step)


if __name__ == "__main__":
    main()
