"""Our engine and `transformers` behind one protocol; what a run writes of its episodes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cycleqd_jax.models.convert import load_model
from cycleqd_jax.models.generate import Decoder
from cycleqd_jax.models.tokenizer import load_tokenizer
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.evaluate import Evaluator
from cycleqd_jax.runs.family import Family
from cycleqd_jax.runs.policy import PopulationPolicy
from cycleqd_jax.runs.records.transcripts import read_transcripts, transcript_file
from cycleqd_jax.runs.transformers_policy import TransformersPolicy
from cycleqd_jax.runs.workspace import Workspace, open_workspace
from cycleqd_jax.sandbox import Limits, Sandbox, open_sandbox
from cycleqd_jax.tasks.base import Message, Policy, Request, Speaker
from cycleqd_jax.tasks.policies import ScriptedPolicy
from cycleqd_jax.tasks.registry import make_tasks
from cycleqd_jax.tasks.rollout import rollout
from cycleqd_jax.tasks.transcript import Transcript, Turn


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with open_sandbox(limits=Limits(seconds=30.0)) as opened:
        yield opened


@pytest.fixture(scope="module")
def workspace(config: RunConfig) -> Workspace:
    return open_workspace(replace(config, temperature=0.8, repeats=3))


@pytest.mark.slow
def test_transformers_and_our_engine_give_the_same_transcripts(
    family: Family, sandbox: Sandbox
) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(family.base, dtype=torch.float32)
    tokenizer = load_tokenizer(family.base)
    architecture, params = load_model(family.base)
    stops = architecture.eos_ids
    decoder = Decoder(params, architecture, stop_tokens=stops, pad_token=stops[0], max_new_tokens=8)
    ours = PopulationPolicy(decoder, tokenizer)
    ours.use(params, population=False)
    theirs = TransformersPolicy(
        model.eval(), tokenizer, stop_tokens=stops, max_new_tokens=8, max_rows=5
    )
    tasks = make_tasks(["coding", "database", "shell"])
    problems = {task.name: task.problems("search", 4) for task in tasks}

    def play(policy: Policy | Speaker) -> list[Transcript]:
        seen: list[Transcript] = []
        rollout(tasks, problems, 1, policy, sandbox, on_episode=seen.append)
        return sorted(seen, key=lambda t: (t.task, t.problem))

    first = play(ours)
    said = {s.messages: s.answer for t in first for s in t.steps if isinstance(s, Turn)}
    assert len(set(said.values())) > 1
    assert play(theirs) == first
    assert play(ScriptedPolicy(lambda request: said[request.messages])) == first
    with pytest.raises(ValueError, match="expected one model, candidate 0, found 1"):
        theirs([Request(1, (Message("user", "x"),))])
    drawing = TransformersPolicy(
        model, tokenizer, stop_tokens=stops, max_new_tokens=8, temperature=1.0
    )
    asked = [Request(0, (Message("user", "x"),), seed) for seed in (1, 2, 1)]
    one, other, again = drawing(asked)
    assert one == again != other


@pytest.mark.slow
def test_attempts_at_a_temperature_differ_and_can_be_repeated(
    workspace: Workspace, sandbox: Sandbox, tmp_path: Path
) -> None:
    problems = workspace.problems("search", 2, 0)
    evaluator = Evaluator(workspace, sandbox, tmp_path)
    played = evaluator.model(workspace.base, problems, phase="test-expert/a")
    assert {name: table.shape for name, table in played.attempts.items()} == {
        name: (1, 2, 3) for name in problems
    }
    assert np.isfinite(played.standard_errors).all()
    first = read_transcripts(transcript_file(tmp_path, "test-expert/a"))
    assert len(first) == 3 * 2 * 3
    assert len(said(first)) > 6  # more than one a problem
    # The same phase again takes the place of what was there.
    evaluator.model(workspace.base, problems, phase="test-expert/a")
    assert read_transcripts(tmp_path / "test-expert-a.jsonl") == first
    evaluator.model(workspace.base, problems, phase="test-expert/b")
    assert said(read_transcripts(tmp_path / "test-expert-b.jsonl")) != said(first)


def said(transcripts: list[Transcript]) -> set[Any]:
    turns = [(t.task, t.problem, s) for t in transcripts for s in t.steps if isinstance(s, Turn)]
    return {(task, problem, turn.answer) for task, problem, turn in turns}


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert read_transcripts(path) == []
    path.write_text('{"task": "t"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl line 1: expected a transcript"):
        read_transcripts(path)
