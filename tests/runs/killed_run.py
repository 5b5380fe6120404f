"""A whole run with scripted scores, which may kill itself: started by `test_survival.py`.

    python tests/runs/killed_run.py CONFIG.json RUN CACHE [EVENT]

Everything is real but the models' answers: a score is a function of the genotype, now and then not
a number. With EVENT the process kills itself (SIGKILL) at that access to a file of the run folder
that would change something. Prints how many there were, and a digest of the final repertoire.
"""

import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cycleqd_jax.qd.compact import compact
from cycleqd_jax.runs import driver
from cycleqd_jax.runs.compilation import cache_compilations
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.rebuild import digests
from cycleqd_jax.runs.records.files import read_json
from cycleqd_jax.runs.search import Search
from cycleqd_jax.tasks.played import Rollout

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link"}


class ScriptedEvaluator:
    """Scores are a function of the bits of a genotype or of a model."""

    def __init__(self, workspace: Any, sandbox: Any, transcripts: Any, hosts: Any) -> None:
        self.tasks = workspace.config.tasks
        self.generated_tokens = 0

    def population(
        self,
        gains: Any,
        problems: Any,
        on_progress: Any = None,
        *,
        phase: str,
        chosen: Any = None,
        more: bool = False,
    ) -> Rollout:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gains)]
        flat = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)
        self.generated_tokens += 10 * len(flat)
        played = self._play(flat.astype(np.float64), problems)
        if chosen is None:
            return played
        masked = {
            name: np.where(chosen[name][:, :, None], found, np.float32(np.nan))
            for name, found in played.attempts.items()
        }
        return replace(played, attempts=masked)

    def model(self, params: Any, problems: Any, *, phase: str) -> Rollout:
        flat = np.concatenate([np.ravel(leaf)[:200] for leaf in jax.tree.leaves(params)])
        return self._play(flat[None].astype(np.float64), problems)

    def _play(self, flat: np.ndarray, problems: Any) -> Rollout:
        solved = {}
        for k, task in enumerate(self.tasks):
            weights = np.random.default_rng(k).normal(size=flat.shape[1]) / 8
            # Sums of products, not a matrix product: those round as the threads like it.
            skill = 0.5 + 0.5 * np.sin((flat * weights).sum(axis=1))
            bars = np.linspace(0.05, 0.95, len(problems[task]))
            solved[task] = (skill[:, None] > bars).astype(np.float32)
            if task == "shell" and len(flat) == 4:  # children, not the experts
                solved[task][np.floor(skill * 1e6) % 8 == 0] = np.nan
        return Rollout(
            attempts={name: found[:, :, None] for name, found in solved.items()},
            seconds={"model": 0.1, "sandbox": 0.0},
            requests=0,
            late=dict.fromkeys(solved, 0),
            failed=dict.fromkeys(solved, 0),
        )


def main() -> None:
    config_file, run, cache, *event = sys.argv[1:]
    cache_compilations(Path(cache))
    config = RunConfig.from_json(read_json(Path(config_file)))
    count = 0

    def watch(name: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        writing = (
            name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if (name in CHANGES or writing) and str(args[0]).startswith(run):
            count += 1
            if event and count == int(event[0]):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    patched: Any = driver
    patched.Evaluator, patched.MemoSandbox = ScriptedEvaluator, nullcontext
    patched.open_sandbox = lambda kind, limits: None
    found: list[Search] = []
    search_run = Search.run

    def remember(self: Search) -> None:
        search_run(self)
        found.append(self)

    patched_search: Any = Search
    patched_search.run = remember
    print("started", flush=True)
    driver.evolve(config, Path(run), command="python run.py", cache=Path(cache))
    for search in found:  # none where the run was finished before
        state = jax.tree.map(lambda leaf: np.asarray(leaf)[None], compact(search.repertoire))
        print(f"events {count}\nrepertoire {digests(state)[0]}", flush=True)


if __name__ == "__main__":
    main()
