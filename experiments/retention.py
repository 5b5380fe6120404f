"""Measure what evolution preserved: any task of lm-evaluation-harness, for models side by side.

    python experiments/retention.py --run runs/quickstart-0 --tasks arc_easy_local gsm8k_local
    python experiments/retention.py --models base=DIR merged=DIR --tasks hellaswag --limit 200

A run's base, experts, best and aggregate model are taken from its folder; models of your own are
Hugging Face folders (or LoRA adapters of --base). `arc_easy_local` and `gsm8k_local` read the files
below $CYCLEQD_DATA; the harness's own tasks download theirs.
"""

import argparse
from pathlib import Path

from rich.console import Console

from cycleqd_jax.cache import default_cache
from cycleqd_jax.progress import Progress
from cycleqd_jax.runs.compilation import cache_compilations
from cycleqd_jax.runs.console import main_guard, parse_experts
from cycleqd_jax.runs.records.files import write_json_atomic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=DIR")
    parser.add_argument("--base", type=Path, help="the model that adapters belong to")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK")
    parser.add_argument("--include-path", type=Path, help="folder with YAML tasks of your own")
    parser.add_argument("--num-fewshot", type=int, help="examples a prompt (default: the task's)")
    parser.add_argument("--limit", type=float, help="first questions only; below 1 a share")
    parser.add_argument("--max-gen-toks", type=int, help="longest answer (default: the task's)")
    parser.add_argument("--chat", action="store_true", help="ask in the models' chat template")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="what starts share")
    parser.add_argument("--out", type=Path, help="JSON of all scores and the harness's results")
    args = parser.parse_args()

    # Here: --help needs no lm_eval, and without it the error is a plain one.
    try:
        from cycleqd_jax.runs.language.retention import (
            Tasks,
            each_model,
            models_of_run,
            retention_table,
            scores_of,
        )
    except ImportError as missing:
        parser.error(str(missing))

    base, models = (None, {}) if args.run is None else models_of_run(args.run)
    own = parse_experts(args.models, "--models")
    models |= {name: Path(folder) for name, folder in own.items()}
    if not models:
        parser.error("expected --run DIR or --models NAME=DIR …")
    cache_compilations(args.cache)
    tasks = Tasks(
        args.tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        gen_kwargs=None if args.max_gen_toks is None else {"max_gen_toks": args.max_gen_toks},
        include_path=args.include_path,
        apply_chat_template=args.chat,
    )
    results = {}
    with Progress("models", len(models)) as progress:
        for name, model in each_model(models, args.base or base):
            (results[name],) = tasks.evaluate(model)
            progress.advance(note=name)
    scores = {name: scores_of(result) for name, result in results.items()}
    Console().print(retention_table(scores))
    if args.out is not None:
        write_json_atomic(
            args.out,
            {
                "models": models,
                "scores": scores,
                "n-samples": {name: result["n-samples"] for name, result in results.items()},
                "n-shot": next(iter(results.values()))["n-shot"],
            },
        )


if __name__ == "__main__":
    with main_guard():
        main()
