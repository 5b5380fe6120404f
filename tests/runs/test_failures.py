"""Candidates without a score are counted; none with one stops the run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.driver import evolve
from cycleqd_jax.runs.evaluate import Evaluator
from cycleqd_jax.runs.failures import Failures, GenerationFailed
from cycleqd_jax.runs.records.jsonl import read_jsonl
from cycleqd_jax.tasks.played import Rollout


def played(scores: Any) -> Rollout:
    table = np.asarray(scores, np.float32)
    solved = {name: table[:, [k]] for k, name in enumerate(("coding", "shell"))}
    return Rollout(
        attempts={name: found[:, :, None] for name, found in solved.items()},
        seconds={},
        requests=0,
        late=dict.fromkeys(solved, 0),
        failed=dict.fromkeys(solved, 0),
    )


def test_failures_are_counted_added_and_told() -> None:
    one = Failures.of(played([[0.5, np.nan], [np.inf, 0.5], [0.5, 0.5]]))
    assert one.candidates == 2
    both = one + Failures(1, 3, 2)
    assert both == Failures(3, 3, 2)
    assert Failures(**both.to_json()) == both
    assert str(both) == "3 candidates without a score, 3 episodes failed, 2 over time"
    assert both
    assert not Failures.of(played([[0.5, 0.5]]))


def test_one_candidate_with_a_score_is_enough() -> None:
    some = played([[0.5, np.nan], [0.5, 0.5]])
    Failures.of(some).refuse_blindness("generation 3", some)
    none = played([[0.5, np.nan], [np.nan, 0.5]])
    with pytest.raises(GenerationFailed) as caught:
        Failures.of(none).refuse_blindness("generation 3", none)
    assert "generation 3: no candidate could be scored" in str(caught.value)
    assert "coding: 1 of 2 candidates without a finite score; shell: 1 of 2" in str(caught.value)


@pytest.mark.slow
def test_a_generation_without_a_score_stops_the_run_which_goes_on_when_the_task_is_mended(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(config, generations=3, checkpoint_every=1)
    real, calls = Evaluator.population, []

    def fails_in_the_second_generation(self: Evaluator, *args: Any, **named: Any) -> Any:
        calls.append(1)
        found = real(self, *args, **named)
        if len(calls) > 1:  # the experts come first
            found.scores[0 if len(calls) == 2 else slice(None), 0] = np.nan
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "population", fails_in_the_second_generation)
        with pytest.raises(GenerationFailed, match="generation 2: no candidate could be scored"):
            evolve(short, tmp_path / "run")
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["failures"] == {"candidates": 1, "episodes": 0, "late": 0}
    evolve(short, tmp_path / "run")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["failures"]["candidates"] for row in rows] == [1, 0, 0]
