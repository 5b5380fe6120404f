"""What is recorded of an episode, and that it survives as JSON; repeats and seeds."""

import json
from typing import Any

import numpy as np
import pytest

from cycleqd_jax.sandbox import Job, Outcome
from cycleqd_jax.tasks.base import Ask, Call, Episode, Message, Problem, Request, Run, Split
from cycleqd_jax.tasks.played import Rollout
from cycleqd_jax.tasks.policies import ScriptedPolicy
from cycleqd_jax.tasks.rollout import rollout
from cycleqd_jax.tasks.transcript import Program, Service, Transcript, Turn


class Box:
    def run(self, jobs: Any) -> list[Outcome]:
        return [Outcome("ok", 0, job.source * 2, "", seconds=0.25) for job in jobs]

    def close(self) -> None: ...

    def __enter__(self) -> "Box":
        return self

    def __exit__(self, *exc: object) -> None: ...


class Talk:
    """Two turns, a program and a call; the second problem fails."""

    name = "talk"

    def problems(
        self, split: Split, count: int, *, seed: int = 0, difficulty: int = 1
    ) -> list[Problem]:
        return [
            Problem(prompt=str(i), answers=("",), solution="", document="", kind="k")
            for i in range(count)
        ]

    def episode(self, problem: Problem) -> Episode:
        history: tuple[Message, ...] = (
            Message("system", "Speak."),
            Message("user", problem.prompt),
        )
        text = yield Ask(history)
        outcome = yield Run(Job("bash", text))
        history += (Message("assistant", text), Message("user", outcome.stdout))
        yield Ask(history)
        number = yield Call(lambda: int(problem.prompt) + 41, 5.0)
        if problem.prompt == "1":
            raise RuntimeError("broken")
        # What was said before is forgotten.
        last = yield Ask((Message("user", f"{number}?"),))
        return float(last.startswith("0"))


def play(speak: Any, candidates: int = 1, **more: Any) -> tuple[Rollout, list[Transcript]]:
    seen: list[Transcript] = []
    task = Talk()
    problems = {"talk": task.problems("search", 2)}
    played = rollout(
        [task], problems, candidates, ScriptedPolicy(speak), Box(), on_episode=seen.append, **more
    )
    return played, sorted(seen, key=lambda t: (t.candidate, t.problem, t.repeat))


def test_everything_that_happened_is_there_and_reads_back() -> None:
    long = "x" * 3000
    _, (good, bad) = play(lambda r: "NaN \ud800" if len(r.messages) == 4 else f"0{long}")
    first, program, second, call, third = good.steps
    assert isinstance(first, Turn)
    assert isinstance(second, Turn)
    assert isinstance(program, Program)
    assert [m.content for m in first.messages] == ["Speak.", "0"]
    assert (first.answer, second.answer) == (f"0{long}", "NaN \ud800")
    assert second.messages[:2] == first.messages
    assert program.source.startswith("0xx")
    assert "1001 characters left out" in program.source
    assert len(program.stdout) < 2100
    assert (program.status, program.seconds) == ("ok", 0.25)
    assert isinstance(call, Service)
    assert (call.result, call.error) == ("41", "")
    assert isinstance(third, Turn)
    assert third.messages == (Message("user", "41?"),)
    assert (good.score, good.ended, good.error) == (1.0, "scored", "")
    assert (bad.score, bad.ended) == (0.0, "failed")
    assert "problem 1 ('1'): RuntimeError: broken" in bad.error
    for transcript in (good, bad):
        row = json.loads(json.dumps(transcript.to_row()))
        assert Transcript.from_row(row) == transcript
    # What was said once is written once.
    assert json.dumps(good.to_row()).count("Speak.") == 1


@pytest.mark.parametrize(
    "change", [{"steps": [{"step": "dance"}]}, {"steps": 3}, {"steps": [{"step": "turn"}]}]
)
def test_what_is_no_transcript_is_refused(change: dict[str, Any]) -> None:
    _, (good, _) = play(lambda r: "")
    with pytest.raises(ValueError, match="expected a transcript, found something else"):
        Transcript.from_row({**good.to_row(), **change})
    with pytest.raises(ValueError, match="KeyError: 'score'"):
        Transcript.from_row({k: v for k, v in good.to_row().items() if k != "score"})


def seeds(transcripts: list[Transcript]) -> dict[tuple[int, int, int, int], int]:
    return {
        (t.candidate, t.problem, t.repeat, turn): step.seed
        for t in transcripts
        for turn, step in enumerate(s for s in t.steps if isinstance(s, Turn))
    }


def test_seeds_are_of_the_turn_of_the_attempt_alone() -> None:
    _, seen = play(lambda r: "0", 3, repeats=4, seed="7/a")
    found = seeds(seen)
    assert len(found) == len(set(found.values())) == 3 * 4 * (3 + 2)
    assert all(0 <= seed < 2**31 for seed in found.values())
    # A part of the population, played alone.
    _, part = play(lambda r: "0", 1, repeats=4, seed="7/a", first_candidate=2, patience=0.0)
    assert seeds(part) == {key: seed for key, seed in found.items() if key[0] == 2}
    _, other = play(lambda r: "0", 3, repeats=4, seed="7/b")
    assert not set(seeds(other).values()) & set(found.values())


def test_repeats_have_a_mean_and_a_standard_error() -> None:
    def speak(request: Request) -> str:
        return str(request.seed % 2)

    played, seen = play(speak, 2, repeats=5)
    table = played.attempts["talk"]
    assert table.shape == (2, 2, 5)
    for t in seen:
        assert table[t.candidate, t.problem, t.repeat] == t.score
    np.testing.assert_allclose(played.solved["talk"], table.mean(axis=2))
    np.testing.assert_allclose(played.scores[:, 0], table.mean(axis=(1, 2)), rtol=1e-6)
    # The second problem always fails, so all the noise is of the first.
    expected = table[:, 0].std(axis=1, ddof=1) / np.sqrt(5) / 2
    np.testing.assert_allclose(played.standard_errors[:, 0], expected, rtol=1e-6)
    assert np.isnan(play(speak, 2)[0].standard_errors).all()
    with pytest.raises(ValueError, match="repeats: expected at least 1, found 0"):
        play(speak, repeats=0)
