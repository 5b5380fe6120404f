"""Episodes divided among hosts: who plays which, and how the parts become the whole.

Laid end to end, candidate after candidate, each as long as its problem is expected to take, the
episodes are cut into as many equal lengths as there are hosts. So a host has whole candidates but
for those at its ends, whose weights and prompts its batches share, and no host has more than an
equal share and one episode. What a problem takes is measured: scores do not depend on who plays.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np

from cycleqd_jax.runs.hosts.processes import Hosts, HostsError
from cycleqd_jax.tasks.base import Problem
from cycleqd_jax.tasks.played import Rollout, together
from cycleqd_jax.tasks.transcript import Transcript, Turn

Problems = Mapping[str, Sequence[Problem]]
Chosen = Mapping[str, np.ndarray]


def deal(costs: Mapping[str, np.ndarray], chosen: Chosen, hosts: int) -> dict[str, np.ndarray]:
    """Who plays what.

    Args:
        costs: task → (problems,) positive, what an episode of each is expected to take.
        chosen: task → (candidates, problems) bool, what is to be played at all.
        hosts: how many there are.

    Returns:
        Task → (candidates, problems) int, the host of every episode; -1 where none is played. No
        host's cost is above an equal share and the costliest episode.
    """
    lengths = np.concatenate([np.where(chosen[t], costs[t], 0.0) for t in chosen], axis=1)
    played = np.concatenate(list(chosen.values()), axis=1)
    ends = np.cumsum(lengths).reshape(lengths.shape)
    # By its middle: an episode that lies on a cut belongs to the side with more of it.
    middles = (ends - lengths / 2) / max(float(lengths.sum()), np.finfo(float).tiny)
    owner = np.where(played, np.minimum((middles * hosts).astype(int), hosts - 1), -1)
    bounds = np.cumsum([len(costs[task]) for task in chosen])[:-1]
    return dict(zip(chosen, np.split(owner, bounds, axis=1), strict=True))


def work_done(transcript: Transcript) -> tuple[float, float, float]:
    """One episode, the characters that went through the model, seconds of its environments."""
    characters = seconds = 0.0
    for step in transcript.steps:
        if isinstance(step, Turn):
            read = sum(len(message.content) for message in step.messages)
            characters += read + len(step.answer)
        else:
            seconds += step.seconds
    return 1.0, characters, seconds


class Costs:
    """What problems take, as measured so far; the same on all hosts.

    An episode takes its share of the model's time by the characters that went through the model
    (read and written cost equal arithmetic), and its share of the time that all waited for
    environments by the seconds its own were at work.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], float] = {}

    def of(self, problems: Problems) -> dict[str, np.ndarray]:
        """Task → (problems,) seconds; a new problem is taken for a usual one of its task."""
        found = {}
        for task, drawn in problems.items():
            costs = np.array([self._known.get((task, p.prompt), np.nan) for p in drawn])
            alike = [cost for (name, _), cost in self._known.items() if name == task]
            typical = np.mean(alike or list(self._known.values()) or [1.0])
            found[task] = np.where(np.isnan(costs), typical, costs)
        return found

    def learn(
        self, problems: Problems, work: Mapping[str, np.ndarray], model: float, waited: float
    ) -> None:
        """Take in what was measured.

        Args:
            problems: that were played.
            work: task → (problems, 3), episodes, characters and environments' seconds.
            model: seconds that the model took for all of it.
            waited: seconds that all waited for environments.
        """
        totals = np.sum([rows.sum(axis=0) for rows in work.values()], axis=0)
        prices = np.array([model, waited]) / np.maximum(totals[1:], 1e-9)
        for task, rows in work.items():
            for problem, row in zip(problems[task], rows, strict=True):
                if row[0]:
                    cost = float(row[1:] @ prices / row[0])
                    self._known[task, problem.prompt] = max(cost, 1e-6)


class Division:
    """The episodes of one rollout, this host's and the others'.

    Args:
        hosts: the run's.
        costs: what problems take; learns from this rollout.
        problems: task name → problems.
        candidates: how many there are.
        chosen: as of `rollout`.
        marks: what tells the candidates apart, their digests.
        transcripts: whether transcripts are wanted.

    Attributes:
        mine: task → (candidates, problems) bool, what this host plays.

    Raises:
        HostsError: the hosts have other candidates, or other problems.
    """

    def __init__(
        self,
        hosts: Hosts,
        costs: Costs,
        problems: Problems,
        candidates: int,
        chosen: Chosen | None,
        marks: Sequence[str],
        *,
        transcripts: bool,
    ) -> None:
        hosts.agree(
            [*marks, _digest(problems)],
            "candidates and problems",
            "give all hosts the same hardware, JAX and files of the tasks",
        )
        self._hosts = hosts
        self._costs = costs
        self._problems = problems
        everything = {t: np.ones((candidates, len(p)), bool) for t, p in problems.items()}
        self._chosen = everything if chosen is None else chosen
        dealt = deal(costs.of(problems), self._chosen, hosts.count)
        self.mine = {task: owner == hosts.index for task, owner in dealt.items()}
        self._work = {task: np.zeros((len(p), 3)) for task, p in problems.items()}
        self._kept: list[Any] | None = [] if transcripts and not hosts.first else None

    def take(self, transcript: Transcript) -> None:
        """Note an episode of this host that has ended."""
        self._work[transcript.task][transcript.problem] += work_done(transcript)
        if self._kept is not None:
            self._kept.append(transcript.to_row())

    def join(
        self, part: Rollout, tokens: int, write: Callable[[Transcript], None] | None
    ) -> tuple[Rollout, int]:
        """What all hosts played, and how many tokens they generated.

        Seconds are the hosts' mean: they play at the same time.

        Args:
            part: what this one played.
            tokens: how many it generated.
            write: takes the transcripts of the other hosts.
        """
        parts = self._hosts.gather(
            {
                "attempts": dict(part.attempts),
                "work": self._work,
                "seconds": dict(part.seconds),
                "counts": [dict(part.late), dict(part.failed), part.requests, tokens],
                # As JSON: what a model says need not be valid text.
                "errors": json.dumps(part.errors),
                "transcripts": json.dumps(self._kept or []),
            },
            "what was played",
        )
        if write is not None:
            for each in parts:
                for row in json.loads(each["transcripts"]):
                    write(Transcript.from_row(row))
        whole = together([_rollout(each, list(part.attempts)) for each in parts])
        for task, played in self._chosen.items():
            if np.isnan(whole.attempts[task][played]).any():
                raise HostsError(f"task {task!r}: episodes that no host played; this is a bug")
        work = {task: sum(each["work"][task] for each in parts) for task in self._work}
        self._costs.learn(self._problems, work, whole.seconds["model"], whole.seconds["sandbox"])
        mean = {name: seconds / len(parts) for name, seconds in whole.seconds.items()}
        return replace(whole, seconds=mean), sum(each["counts"][3] for each in parts)


def _rollout(row: Mapping[str, Any], tasks: Sequence[str]) -> Rollout:
    late, failed, requests, _ = row["counts"]
    return Rollout(
        attempts={task: row["attempts"][task] for task in tasks},
        seconds=row["seconds"],
        requests=requests,
        late=late,
        failed=failed,
        errors=tuple(json.loads(row["errors"])),
    )


def _digest(problems: Problems) -> str:
    found = blake2b(digest_size=16)
    for task, drawn in problems.items():
        for problem in drawn:
            found.update(f"{task}\0{problem.prompt}\0".encode("utf-8", "surrogatepass"))
    return found.hexdigest()
