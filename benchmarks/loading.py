"""Memory and speed of loading and saving a sharded model folder, against transformers with torch.

    python benchmarks/loading.py [--gigabytes 1.0] [--folder DIR] [--json FILE]

A model of about that size with random bfloat16 weights is written to several shards, then loaded
and saved again in a process of its own by each side. "over the model" is the highest resident
memory of the process during the call, less what it held before and the bytes of the weights; the
limit is the largest stack of one kind of matrix. Both sides hold the weights in ordinary memory at
the end.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from measuring import row, write_rows

from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import save_model
from cycleqd_jax.models.specs import LeafSpec, leaf_table

_METER = """
import json, sys, time
from pathlib import Path
def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
def measured(call):
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    return result, {"peak": memory("VmHWM") - before, "seconds": seconds}
folder, target = sys.argv[1:3]
"""
_OURS = """
import jax
from cycleqd_jax.models.convert import load_model, save_model
jax.block_until_ready(jax.numpy.zeros(8))
(config, params), load = measured(lambda: jax.block_until_ready(load_model(folder)))
_, save = measured(lambda: save_model(target, config, params, max_shard_size=300_000_000))
print(json.dumps([load, save]))
"""
_THEIRS = """
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
torch.zeros(8)
def load():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for weight in model.parameters():
        weight.detach().view(-1)[::512].sum()  # pages that are only mapped yet come in
    return model
model, loaded = measured(load)
_, save = measured(lambda: model.save_pretrained(target, max_shard_size="300MB"))
print(json.dumps([loaded, save]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where the model is made (default: temporary)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        config = architecture(options.gigabytes)
        size, stack = make_model(config, Path(scratch, "model"))
        print(f"{size / 1e9:.2f} GB in {config.num_layers} layers, a stack {stack / 1e6:.0f} MB")
        ours = measure(_OURS, Path(scratch, "model"), Path(scratch, "ours"))
        theirs = measure(_THEIRS, Path(scratch, "model"), Path(scratch, "theirs"))
    rows = []
    for name, our, their, held in (
        ("load", ours[0], theirs[0], size),
        ("save", ours[1], theirs[1], 0),
    ):
        ours_over, theirs_over = (max(m["peak"] - held, 0) / 1e6 for m in (our, their))
        title = f"{name}: over the model"
        rows.append(row(title, ours_over, theirs_over, "transformers", "MB", stack / 1e6))
        fast, slow = (size / m["seconds"] / 1e9 for m in (our, their))
        title = f"{name}: speed"
        rows.append(row(title, fast, slow, "transformers", "GB/s", more_is_better=True))
    for measured in rows:
        print(
            f"{measured['row']:22s} {measured['ours']:8.2f} {measured['unit']:5s}"
            f"{measured['peer_name']} {measured['peer']:.2f}   ratio {measured['ratio']}"
        )
    write_rows(options.json, rows)


def architecture(gigabytes: float) -> LlamaConfig:
    """A Llama of about that size in bfloat16, with as many layers as it takes."""
    layers = max(1, round((gigabytes * 1e9 / 2 - 98e6) / 25.2e6))
    return LlamaConfig(32_000, 1536, 4096, layers, 12, 4, 128, dtype="bfloat16", eos_ids=(2,))


def make_model(config: LlamaConfig, folder: Path) -> tuple[int, int]:
    """Write random weights; return their bytes and those of the largest leaf."""
    rng = np.random.default_rng(0)
    sizes = []

    def leaf(spec: LeafSpec) -> np.ndarray:
        shape = spec.full_shape(config.num_layers)
        sizes.append(2 * int(np.prod(shape)))
        # Any bits but those of infinities and NaN will do; drawing normal numbers takes minutes.
        bits = rng.integers(0, 0x3F80, shape, dtype=np.uint16)
        return bits.view(jax.numpy.bfloat16)

    save_model(folder, config, jax.tree.map(leaf, leaf_table(config)), max_shard_size=300_000_000)
    return sum(sizes), max(sizes)


def measure(program: str, folder: Path, target: Path) -> list[dict[str, float]]:
    """Run one side's program; what it measured of loading and saving."""
    command = [sys.executable, "-c", _METER + program, str(folder), str(target)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
