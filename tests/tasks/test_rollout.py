"""The batched agent loop: whose score goes where, and how many batches there are."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from cycleqd_jax.sandbox import Job, MemoSandbox, Outcome, Sandbox
from cycleqd_jax.tasks.base import Ask, Call, Episode, Message, Problem, Request, Run, Split, Task
from cycleqd_jax.tasks.environments import CALLERS
from cycleqd_jax.tasks.played import together
from cycleqd_jax.tasks.registry import make_tasks
from cycleqd_jax.tasks.rollout import rollout
from cycleqd_jax.tasks.transcript import Transcript


@dataclass(frozen=True)
class Counting:
    """A task of ``turns`` messages and programs; the score is the last program's output."""

    name: str
    turns: int = 1

    def problems(
        self, split: Split, count: int, *, seed: int = 0, difficulty: int = 1
    ) -> list[Problem]:
        return [
            Problem(prompt=f"{self.name} {i}", answers=("",), solution="", document="", kind="k")
            for i in range(count)
        ]

    def episode(self, problem: Problem) -> Episode:
        history = [Message("user", problem.prompt)]
        outcome: Outcome | None = None
        for _ in range(self.turns):
            text = yield Ask(tuple(history))
            assert isinstance(text, str)
            answer = yield Run(Job("bash", text))
            assert isinstance(answer, Outcome)
            outcome = answer
            history += [Message("assistant", text), Message("user", outcome.stdout)]
        assert outcome is not None
        return float(outcome.stdout)


@dataclass(frozen=True)
class Waiting:
    """A task that asks once, calls ``function`` with the text, and scores what comes of it."""

    function: Callable[[str], float]
    seconds: float = 30.0
    name: str = "waiting"

    def problems(
        self, split: Split, count: int, *, seed: int = 0, difficulty: int = 1
    ) -> list[Problem]:
        return Counting(self.name).problems(split, count)

    def episode(self, problem: Problem) -> Episode:
        text = yield Ask((Message("user", problem.prompt),))
        try:
            value = yield Call(lambda: self.function(text), self.seconds)
        except TimeoutError:
            return 0.5
        text = yield Ask((Message("user", f"again {value}"),))
        return float(value)


@dataclass
class EchoSandbox:
    """Answers every program with its own text, and notes the batches."""

    batches: list[int] = field(default_factory=list)

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        self.batches.append(len(jobs))
        return [Outcome("ok", 0, job.source, "") for job in jobs]

    def close(self) -> None: ...

    def __enter__(self) -> "EchoSandbox":
        return self

    def __exit__(self, *exc: object) -> None: ...


@dataclass
class Speaker:
    """Answers every request with a function of it, and notes the batches."""

    speak: Callable[[Request], str]
    batches: list[list[Request]] = field(default_factory=list)

    def __call__(self, requests: Sequence[Request]) -> list[str]:
        self.batches.append(list(requests))
        return [self.speak(request) for request in requests]


class Talkative:
    """A `Speaker` that answers from other threads, each a little later."""

    def __init__(self, speak: Callable[[Request], str], fails_at: int | None = None) -> None:
        self.speak, self.fails_at = speak, fails_at
        self.asked: list[int] = []
        self.ended: list[Any] = []
        self.closed = 0

    def converse(
        self, heard: Callable[[Any, Any], None], failed: Callable[[Exception], None]
    ) -> "Talkative":
        self.heard, self.failed = heard, failed
        return self

    def ask(self, who: Sequence[Any], requests: Sequence[Request]) -> None:
        first = sum(self.asked)
        self.asked.append(len(requests))

        def answer() -> None:
            for i, (episode, request) in enumerate(zip(who, requests, strict=True)):
                if first + i == self.fails_at:
                    self.failed(RuntimeError("lost the model"))
                    return
                time.sleep(0.001)
                self.heard(episode, self.speak(request).encode())

        threading.Thread(target=answer).start()

    def texts(self, heard: Sequence[Any]) -> list[str]:
        return [answer.decode() for answer in heard]

    def end(self, who: Any) -> None:
        self.ended.append(who)

    def close(self) -> None:
        self.closed += 1


def value_of(request: Request) -> float:
    """Another score for every candidate, task and problem."""
    task, number = request.messages[0].content.split()
    return request.candidate / 4 + int(number) / 32 + (task == "long") / 64


def problems_of(*tasks: Task, count: int = 3) -> dict[str, Sequence[Problem]]:
    return {task.name: task.problems("search", count + i) for i, task in enumerate(tasks)}


SHORT, LONG = Counting("short"), Counting("long", turns=3)


def test_every_episode_scores_in_its_own_place() -> None:
    policy = Speaker(lambda request: str(value_of(request)))
    played = rollout([LONG, SHORT], problems_of(LONG, SHORT), 3, policy, EchoSandbox())
    candidates = np.arange(3)[:, None] / 4
    assert {name: (s.shape, s.dtype) for name, s in played.solved.items()} == {
        "long": ((3, 3), np.float32),
        "short": ((3, 4), np.float32),
    }
    np.testing.assert_array_equal(played.solved["long"], candidates + np.arange(3) / 32 + 1 / 64)
    np.testing.assert_array_equal(played.solved["short"], candidates + np.arange(4) / 32)
    assert played.scores.dtype == np.float32
    np.testing.assert_allclose(
        played.scores, np.stack([s.mean(1) for s in played.solved.values()], axis=1), rtol=1e-6
    )


def test_a_speaker_gets_the_scores_of_a_policy() -> None:
    def speak(request: Request) -> str:
        return str(value_of(request))

    problems = problems_of(LONG, SHORT, count=5)
    seen: dict[str, list[Transcript]] = {"policy": [], "speaker": []}
    talkative = Talkative(speak)
    whole = rollout(
        [LONG, SHORT], problems, 3, Speaker(speak), EchoSandbox(), on_episode=seen["policy"].append
    )
    said = rollout(
        [LONG, SHORT], problems, 3, talkative, EchoSandbox(), on_episode=seen["speaker"].append
    )
    for name, scores in whole.attempts.items():
        np.testing.assert_array_equal(said.attempts[name], scores)
    assert said.requests == whole.requests == sum(talkative.asked) == 3 * (5 * 3 + 6)
    assert talkative.asked[0] == 3 * (5 + 6)
    # Nobody waits for the others: later turns come in several parts.
    assert len(talkative.asked) > 3
    assert len(talkative.ended) == 3 * (5 + 6)
    assert talkative.closed == 1
    assert said.seconds["model"] > 0.0

    def sort(transcripts: list[Transcript]) -> list[Transcript]:
        return sorted(transcripts, key=lambda t: (t.task, t.candidate, t.problem))

    assert sort(seen["speaker"]) == sort(seen["policy"])


def test_a_speaker_is_asked_before_slow_environments_end() -> None:
    asked = threading.Event()

    def speak(request: Request) -> str:
        asked.set()
        return "1"

    class First(Waiting):
        def episode(self, problem: Problem) -> Episode:
            waited = yield Call(lambda: self.function(""), 30.0)
            assert isinstance(waited, float)
            return waited

    tasks: list[Task] = [First(lambda text: float(asked.wait(5.0))), SHORT]
    played = rollout(tasks, problems_of(*tasks), 1, Talkative(speak), EchoSandbox(), patience=60)
    assert played.scores.tolist() == [[1.0, 1.0]]


def test_a_speaker_that_fails_ends_the_rollout() -> None:
    talkative = Talkative(lambda request: "0", fails_at=7)
    with pytest.raises(RuntimeError, match="lost the model"):
        rollout([LONG], problems_of(LONG, count=4), 2, talkative, EchoSandbox())
    assert talkative.closed == 1


def test_chosen_episodes_score_as_they_do_among_all() -> None:
    policy = Speaker(lambda request: str(value_of(request)))
    problems, generator = problems_of(LONG, SHORT), np.random.default_rng(0)
    whole = rollout([LONG, SHORT], problems, 4, policy, EchoSandbox(), repeats=2)
    chosen = {n: generator.random(s.shape) < 0.5 for n, s in whole.solved.items()}
    chosen["long"][0], chosen["short"][0] = True, True
    others = {name: ~mask for name, mask in chosen.items()}
    parts = [
        rollout([LONG, SHORT], problems, 4, policy, EchoSandbox(), repeats=2, chosen=mask)
        for mask in (chosen, others)
    ]
    for name, mask in chosen.items():
        scores = parts[0].attempts[name]
        np.testing.assert_array_equal(np.isnan(scores), ~mask[..., None] & np.full(2, True))
        np.testing.assert_array_equal(scores[mask], whole.attempts[name][mask])
    np.testing.assert_array_equal(np.isfinite(parts[0].scores), [[True] * 2] + [[False] * 2] * 3)
    joined = together(parts)
    np.testing.assert_array_equal(joined.scores, whole.scores)
    np.testing.assert_array_equal(joined.standard_errors, whole.standard_errors)
    assert joined.requests == whole.requests
    with pytest.raises(ValueError, match="one in two"):
        together([whole, parts[0]])
    with pytest.raises(ValueError, match=r"chosen, task 'long': expected \(3, 3\), found \(4, 3\)"):
        rollout([LONG, SHORT], problems, 3, policy, EchoSandbox(), chosen=chosen)


def test_the_order_of_the_tasks_is_the_order_of_the_columns() -> None:
    policy = Speaker(lambda request: str(value_of(request)))
    problems = problems_of(SHORT, LONG)
    one = rollout([SHORT, LONG], problems, 2, policy, EchoSandbox())
    other = rollout([LONG, SHORT], problems, 2, policy, EchoSandbox())
    assert list(one.solved) == ["short", "long"]
    np.testing.assert_array_equal(one.scores, other.scores[:, ::-1])


def test_there_is_one_batch_of_messages_and_one_of_programs_a_round() -> None:
    policy, sandbox = Speaker(lambda request: "1"), EchoSandbox()
    played = rollout([SHORT, LONG], problems_of(SHORT, LONG), 5, policy, sandbox, patience=30)
    assert [len(batch) for batch in policy.batches] == [5 * 7, 5 * 4, 5 * 4]
    assert sandbox.batches == [5 * 7, 5 * 4, 5 * 4]
    assert played.requests == 5 * 15
    assert set(played.seconds) == {"model", "sandbox"}


def test_later_turns_hold_the_whole_conversation() -> None:
    policy = Speaker(lambda request: f"0.{len(request.messages)}")
    rollout([LONG], problems_of(LONG, count=1), 1, policy, EchoSandbox())
    (last,) = policy.batches[-1]
    assert [message.content for message in last.messages] == ["long 0", "0.1", "0.1", "0.3", "0.3"]
    assert [message.role for message in last.messages] == ["user", "assistant"] * 2 + ["user"]


def test_progress_counts_finished_episodes() -> None:
    counts: list[int] = []
    policy = Speaker(lambda request: "0")
    rollout(
        [SHORT, LONG],
        problems_of(SHORT, LONG),
        2,
        policy,
        EchoSandbox(),
        counts.append,
        patience=30,
    )
    assert counts == [6, 14]


def test_calls_of_a_round_wait_together_and_answer_their_own_episodes() -> None:
    together = threading.Barrier(48, timeout=20)

    def wait(text: str) -> float:
        together.wait()
        return float(text)

    task, policy = Waiting(wait), Speaker(lambda request: str(request.candidate / 32))
    problems = problems_of(task, count=2)
    played = rollout([task], problems, 24, policy, EchoSandbox(), patience=30)
    np.testing.assert_array_equal(played.solved["waiting"], [[i / 32, i / 32] for i in range(24)])
    assert [len(batch) for batch in policy.batches] == [48, 48]


def test_a_call_over_its_own_time_is_told_to_its_own_episode_only() -> None:
    released = threading.Event()

    def wait(text: str) -> float:
        if text == "1":
            released.wait(20)
        return 1.0

    task, policy = Waiting(wait, seconds=0.2), Speaker(lambda request: str(request.candidate))
    started = time.monotonic()
    played = rollout([task], problems_of(task, count=1), 3, policy, EchoSandbox())
    assert time.monotonic() - started < 10
    released.set()
    np.testing.assert_array_equal(played.solved["waiting"], [[1], [0.5], [1]])
    assert (played.late, played.failed) == ({"waiting": 0}, {"waiting": 0})


def test_a_call_that_waits_for_its_turn_is_not_late() -> None:
    def wait(text: str) -> float:
        time.sleep(0.3)
        return 1.0

    # Three times as many calls as threads: the last begins after the time of one.
    task, policy = Waiting(wait, seconds=0.5), Speaker(lambda request: "1")
    played = rollout([task], problems_of(task, count=3), CALLERS, policy, EchoSandbox())
    np.testing.assert_array_equal(played.scores, np.ones((CALLERS, 1)))


def test_no_candidates_give_no_rows() -> None:
    played = rollout([SHORT], problems_of(SHORT), 0, Speaker(lambda request: ""), EchoSandbox())
    assert played.scores.shape == (0, 1)
    assert played.requests == 0


@pytest.mark.parametrize("surplus", [-1, 1])
def test_a_wrong_number_of_answers_is_an_error(surplus: int) -> None:
    def policy(requests: Sequence[Request]) -> list[str]:
        return ["1"] * (len(requests) + surplus)

    message = f"expected 6 answers from the policy, one a request, found {6 + surplus}"
    with pytest.raises(ValueError, match=message):
        rollout([SHORT], problems_of(SHORT), 2, policy, EchoSandbox())


@pytest.mark.parametrize("problems", [{}, {"long": []}])
def test_a_task_without_problems_is_an_error(problems: dict[str, Sequence[Problem]]) -> None:
    problems = {**problems_of(SHORT), **problems}
    policy = Speaker(lambda request: "1")
    with pytest.raises(ValueError, match="expected problems for task 'long', found none"):
        rollout([SHORT, LONG], problems, 1, policy, EchoSandbox())
    assert policy.batches == []


def test_candidates_of_a_mixed_population_get_their_own_rows(sandbox: Sandbox) -> None:
    tasks = make_tasks(["coding", "database", "shell"])
    problems = {task.name: task.problems("search", 6, seed=4) for task in tasks}
    known = {p.prompt: (name, p) for name, drawn in problems.items() for p in drawn}
    skills = [("coding", "database", "shell"), (), ("coding",), ("database",), ("shell", "coding")]

    def speak(request: Request) -> str:
        name, problem = known[request.messages[0].content]
        return (
            problem.answers[len(request.messages) // 2] if name in skills[request.candidate] else ""
        )

    policy = Speaker(speak)
    played = rollout(tasks, problems, len(skills), policy, sandbox, patience=30)
    expected = [[float(task.name in mine) for task in tasks] for mine in skills]
    np.testing.assert_array_equal(played.scores, expected)
    # Only agents with a statement have a second turn.
    assert [len(batch) for batch in policy.batches] == [5 * 18, 2 * 6]


@pytest.mark.parametrize("name", ["coding", "database", "shell"])
def test_the_same_text_for_the_same_problem_runs_once(name: str, sandbox: Sandbox) -> None:
    tasks = [task for task in make_tasks(["coding", "database", "shell"]) if task.name == name]
    problems = {name: tasks[0].problems("search", 3, seed=9)}
    known = {problem.prompt: problem for problem in problems[name]}

    def speak(request: Request) -> str:
        answer = known[request.messages[0].content].answers[len(request.messages) // 2]
        # The last candidate writes the same with a space more.
        return answer + " " * (request.candidate == 4)

    memo = MemoSandbox(sandbox)  # not closed: the sandbox is everybody's
    played = rollout(tasks, problems, 5, Speaker(speak), memo)
    np.testing.assert_array_equal(played.scores, np.ones((5, 1)))
    different = 3 if name == "database" else 6  # a statement is stripped before it is run
    assert (memo.misses, memo.hits) == (different, 15 - different)
    rollout(tasks, problems, 5, Speaker(speak), memo)
    assert memo.misses == different
