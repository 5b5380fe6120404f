"""Log-likelihood requests: ours, the harness's backend for transformers, many candidates at once.

    python benchmarks/retention.py [--questions 40] [--candidates 8] [--json FILE]

The model of `decode.py` (24.6 million parameters, float32). A question of 15 to 60 tokens has four
choices of 1 to 8 tokens, as ARC-Easy's. `HFLM` of lm-evaluation-harness is asked for the same
tokens in batches of 16; answers are compared. The candidates are answered all together, and one
after the other with their weights built (time included). The best of two rounds counts, in turns.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decode
import jax
import jax.numpy as jnp
import numpy as np
from measuring import in_turns, row, write_rows

from cycleqd_jax.models import kernels
from cycleqd_jax.models.convert import save_model
from cycleqd_jax.models.likelihood import Scorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16, help="of each of the three experts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    attached = decode.population(options.rank, options.candidates)
    build = jax.jit(kernels.materialise_candidate)
    single = build(attached, 0)
    pairs = []
    for _ in range(options.questions):
        question = draw(rng, int(rng.integers(15, 60)))
        pairs += [(question, draw(rng, int(length))) for length in rng.integers(1, 9, 4)]
    theirs = backend(single)
    requests = [(None, *pair) for pair in pairs]
    scorers = {mode: Scorer(decode.CONFIG, mode=mode) for mode in ("rows", "candidates")}
    alone = Scorer(decode.CONFIG)

    def one_after_the_other() -> None:
        for candidate in range(options.candidates):
            alone.score(pairs, build(attached, jnp.int32(candidate)))

    expected = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    found = alone.score(pairs, single).log_probability[0]
    difference = max(abs(a - b[0]) for a, b in zip(found, expected, strict=True))
    assert difference < 1e-3, f"answers differ by {difference}"

    def together(scorer: Scorer) -> Callable[[], Any]:
        scorer.score(pairs, attached)
        return lambda: scorer.score(pairs, attached)

    seconds = in_turns(
        {
            "ours": lambda: alone.score(pairs, single),
            "HFLM": lambda: theirs._loglikelihood_tokens(requests, disable_tqdm=True),
            "one after the other": one_after_the_other,
            **{f"together, {mode}": together(scorer) for mode, scorer in scorers.items()},
        },
        rounds=2,
    )
    best = {name: min(times) for name, times in seconds.items()}
    count = len(pairs)
    for name, value in best.items():
        asked = count if name in ("ours", "HFLM") else count * options.candidates
        print(f"{name:22s} {value:7.2f} s   {asked / value:7.0f} requests/s")
    print(f"largest difference of an answer: {difference:.1e}")
    many = count * options.candidates
    rows = [
        row(
            "log-likelihood requests, one model",
            count / best["ours"],
            count / best["HFLM"],
            "lm_eval HFLM, batches of 16",
            "1/s",
            more_is_better=True,
        ),
        row(
            f"log-likelihood requests, {options.candidates} candidates",
            many / best["together, rows"],
            many / best["one after the other"],
            "ours, one candidate after the other",
            "1/s",
            more_is_better=True,
        ),
    ]
    write_rows(options.json, rows)


def draw(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(1, decode.CONFIG.vocab_size, length).tolist()


def backend(params: Any) -> Any:
    """The harness's own backend on the same weights; its tokenizer is never asked."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    stacked = params.replace(layers=jax.tree.map(lambda *leaf: jnp.stack(leaf), *params.layers))
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model", decode.CONFIG, stacked)
        model = LlamaForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    return HFLM(model, tokenizer=tokenizer, batch_size=16)


if __name__ == "__main__":
    main()
