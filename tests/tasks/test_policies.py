"""Policies without a model; the same texts score the same, whoever says them and when."""

import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import cycleqd_jax
from cycleqd_jax.sandbox import Sandbox
from cycleqd_jax.tasks.base import Message, Problem, Request, Task
from cycleqd_jax.tasks.osbench.offline import NOT_OFFLINE
from cycleqd_jax.tasks.osbench.task import OSBenchProblem
from cycleqd_jax.tasks.played import Rollout
from cycleqd_jax.tasks.policies import ScriptedPolicy, ideal_policy
from cycleqd_jax.tasks.registry import BENCHMARKS, TASKS
from cycleqd_jax.tasks.rollout import rollout
from cycleqd_jax.tasks.transcript import Transcript, Turn


def open_task(name: str, monkeypatch: pytest.MonkeyPatch) -> Task:
    beside = Path(cycleqd_jax.__file__).parents[2] / "shared" / "data"
    monkeypatch.setenv("CYCLEQD_DATA", os.environ.get("CYCLEQD_DATA", str(beside)))
    monkeypatch.delenv("CYCLEQD_DB", raising=False)
    try:
        return {**TASKS, **BENCHMARKS}[name]()
    except (ValueError, ImportError, OSError) as error:
        pytest.skip(f"{name} cannot be opened here: {error}")


# Opening some benchmarks takes longer than playing them: machines start, references are run.
QUICK = {*TASKS, "dbbench/loadable", "mbpp"}


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in (*TASKS, *BENCHMARKS)
    ],
)
def test_the_same_texts_score_the_same(
    name: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CYCLEQD_CACHE", str(tmp_path))
    task = open_task(name, monkeypatch)
    drawn = task.problems("search", 12, seed=3)
    # Some public problems ask the same of different systems; an agent cannot tell which is meant.
    asked = Counter(problem.prompt for problem in drawn)
    told = [problem for problem in drawn if asked[problem.prompt] == 1 and can_be_solved(problem)]
    problems = {task.name: told[:4]}
    ideal = ideal_policy(problems[task.name])

    def speak(request: Request) -> str:
        # The second candidate loses the end of what it says, the third says nothing.
        text = ideal.speak(request)
        return [text, text[: -len(text) // 3], ""][request.candidate]

    class Replay:
        """Says what was said in these conversations, in its own time."""

        def __init__(self, transcripts: Sequence[Transcript]) -> None:
            turns = [(t.candidate, s) for t in transcripts for s in t.steps if isinstance(s, Turn)]
            self._said = {(candidate, turn.messages): turn.answer for candidate, turn in turns}

        def __call__(self, requests: Sequence[Request]) -> list[str]:
            time.sleep(random.Random(len(requests)).random() / 100)
            return [self._said[request.candidate, request.messages] for request in requests]

    def play(policy: ScriptedPolicy | Replay, patience: float) -> tuple[Rollout, list[Transcript]]:
        seen: list[Transcript] = []
        played = rollout(
            [task], problems, 3, policy, sandbox, patience=patience, on_episode=seen.append
        )
        return played, sorted(seen, key=lambda t: (t.candidate, t.problem))

    first, seen = play(ScriptedPolicy(speak), 30.0)
    again, replayed = play(Replay(seen), 0.0)
    np.testing.assert_array_equal(again.solved[task.name], first.solved[task.name])
    assert list(map(said, replayed)) == list(map(said, seen))
    assert first.scores[0] == 1.0
    assert first.scores[2] < 1.0
    assert first.failed == {task.name: 0}


def can_be_solved(problem: Problem) -> bool:
    return not (isinstance(problem, OSBenchProblem) and problem.record.id in NOT_OFFLINE)


def said(transcript: Transcript) -> tuple[object, ...]:
    """All that may not depend on the time: what programs print may hold seconds they took."""
    turns = tuple(step for step in transcript.steps if isinstance(step, Turn))
    return transcript.candidate, transcript.problem, transcript.score, transcript.ended, turns


def test_an_ideal_agent_answers_problems_of_its_own_only() -> None:
    policy = ideal_policy(TASKS["database"]().problems("search", 3))
    with pytest.raises(ValueError, match=r"begins like a demonstration of one of 3 problems"):
        policy([Request(0, (Message("user", "Who are you?"),))])
