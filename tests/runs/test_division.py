"""Who plays what: every episode once, in equal parts, and nothing depends on it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cycleqd_jax.runs.hosts.division import Costs, Division, deal
from cycleqd_jax.runs.hosts.processes import Hosts, HostsError
from cycleqd_jax.tasks.base import Message, Problem
from cycleqd_jax.tasks.played import Rollout
from cycleqd_jax.tasks.transcript import Program, Transcript, Turn


def problem(prompt: str) -> Problem:
    return Problem(prompt=prompt, answers=(), solution="", document="", kind="")


class Talk(Hosts):
    """Hosts in one process: what one of them gathers is what `others` say, with its own."""

    def __init__(self, index: int, said: dict[tuple[int, str], Any], count: int) -> None:
        self.index, self.count, self._said = index, count, said

    def gather(self, value: Any, what: str) -> list[Any]:
        self._said[self.index, what] = value
        return [self._said.get((i, what), value) for i in range(self.count)]


@given(
    seed=st.integers(0, 10_000),
    candidates=st.integers(1, 20),
    hosts=st.integers(1, 300),
    share=st.sampled_from((0.0, 0.3, 1.0)),
)
def test_every_chosen_episode_has_one_host_and_no_host_too_much(
    seed: int, candidates: int, hosts: int, share: float
) -> None:
    dice = np.random.default_rng(seed)
    costs = {task: dice.pareto(1.0, dice.integers(1, 9)) + 0.01 for task in ("a", "b")}
    chosen = {task: dice.random((candidates, len(c))) < share for task, c in costs.items()}
    dealt = deal(costs, chosen, hosts)
    loads = np.zeros(hosts)
    for task, owner in dealt.items():
        assert ((owner >= 0) == chosen[task]).all()
        assert owner.max(initial=-1) < hosts
        np.add.at(
            loads, owner[chosen[task]], np.broadcast_to(costs[task], owner.shape)[chosen[task]]
        )
    most = max((c[chosen[t].any(axis=0)].max(initial=0.0) for t, c in costs.items()), default=0.0)
    assert loads.max() <= loads.sum() / hosts + most + 1e-9


def test_a_host_has_whole_candidates_where_they_divide() -> None:
    dealt = deal({"a": np.array([1.0, 5.0, 2.0])}, {"a": np.ones((8, 3), bool)}, 4)
    assert dealt["a"].tolist() == [[host] * 3 for host in (0, 0, 1, 1, 2, 2, 3, 3)]


def test_long_episodes_go_to_fewer_hands() -> None:
    chosen = {"a": np.ones((1, 6), bool)}
    dealt = deal({"a": np.array([5.0, 1.0, 1.0, 1.0, 1.0, 1.0])}, chosen, 2)
    assert dealt["a"].tolist() == [[0, 1, 1, 1, 1, 1]]


def test_costs_follow_characters_and_seconds() -> None:
    costs = Costs()
    problems = {"a": [problem("x"), problem("y")], "b": [problem("z")]}
    assert costs.of(problems)["a"].tolist() == [1.0, 1.0]
    work = {"a": np.array([[2, 200, 0.0], [1, 300, 0.0]]), "b": np.array([[1, 500, 4.0]])}
    costs.learn(problems, work, model=10.0, waited=2.0)
    found = costs.of({"a": [problem("x"), problem("y"), problem("new")], "b": problems["b"]})
    # 0.01 s a character, 0.5 s a second of the environments.
    np.testing.assert_allclose(found["a"], [1.0, 3.0, 2.0])
    np.testing.assert_allclose(found["b"], [7.0])


def played(attempts: dict[str, np.ndarray], **more: Any) -> Rollout:
    none = dict.fromkeys(attempts, 0)
    return Rollout(
        attempts, {"model": 4.0, "sandbox": 2.0}, requests=3, late=none, failed=none, **more
    )


def test_the_parts_become_the_whole() -> None:
    said: dict[tuple[int, str], Any] = {}
    problems = {"b": [problem("x"), problem("y")], "a": [problem("z")]}
    whole = {"b": np.arange(4.0, dtype=np.float32).reshape(2, 2, 1) / 4}
    whole["a"] = np.ones((2, 1, 1), np.float32)
    divisions = [
        Division(Talk(i, said, 2), Costs(), problems, 2, None, ["m"], transcripts=True)
        for i in range(2)
    ]
    turn = Turn((Message("user", "hello"),), "\ud800", 3)
    for number, division in enumerate(divisions):
        program = Program("python", "", "", "ok", 0, "", "", "", 0.5)
        division.take(Transcript("b", 0, number, 0, 1.0, "scored", "", (turn, program)))
    written: list[Transcript] = []
    result = None
    for number in (1, 0):  # process 0 last: the others' parts are there then
        division = divisions[number]
        part = {
            t: np.where(division.mine[t][:, :, None], scores, np.nan).astype(np.float32)
            for t, scores in whole.items()
        }
        write = written.append if number == 0 else None
        if number:
            with pytest.raises(ValueError, match="found one in two"):  # it hears only itself here
                division.join(played(part, errors=("\udfff",)), 10, write)
        else:
            result, tokens = division.join(played(part), 5, write)
    assert result is not None
    assert list(result.attempts) == ["b", "a"]
    for task, scores in whole.items():
        np.testing.assert_array_equal(result.attempts[task], scores)
    assert (tokens, result.requests, result.errors) == (15, 6, ("\udfff",))
    assert result.seconds == {"model": 4.0, "sandbox": 2.0}
    (transcript,) = written
    assert transcript.candidate == 1
    assert replace(transcript, candidate=0).steps[0] == turn


def test_hosts_with_other_candidates_stop() -> None:
    said: dict[tuple[int, str], Any] = {}
    problems = {"a": [problem("x")]}
    Division(Talk(1, said, 2), Costs(), problems, 1, None, ["m"], transcripts=False)
    with pytest.raises(HostsError, match="another in process 1 than in process 0; give all hosts"):
        Division(Talk(0, said, 2), Costs(), problems, 1, None, ["n"], transcripts=False)
