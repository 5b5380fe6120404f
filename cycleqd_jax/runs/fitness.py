"""How many problems a child is scored on: all, or fewer where that is enough.

Evaluation is what a search costs. Two settings make it cheaper, alone or together:

- *Racing* (`RunConfig.racing`) plays a generation in blocks of problems, and after every block
  leaves out the children that will not enter an archive (`cycleqd_jax.qd.racing`).
- *Growing subsets* (`RunConfig.subsets`) score on few problems first and on more later. When the
  subset grows, the elites play what they lack and are offered to empty archives anew.

Both follow from the config, the generation and the repertoire alone: a resumed run needs nothing
else. What the elites made of every problem is kept with them as the extra score ``solved``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.qd.racing import (
    Belief,
    believe,
    can_enter,
    chance_of_entering,
    draw_finals,
    final_range,
    informative_order,
)
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.evaluate import Evaluator, Problems
from cycleqd_jax.tasks.played import Rollout, together
from cycleqd_jax.tasks.stratified import strata_of, stratified_order

SOLVED = "solved"
"""The extra score that holds what an elite made of every problem, (K, N), NaN where unplayed."""

_DRAWS = 1000
# Streams of random numbers of one seed: the order of the problems, and the beliefs of each block.
_ORDER, _BELIEF = 0, 1


@dataclass(frozen=True)
class Scored:
    """What is known of a batch.

    Attributes:
        played: its episodes.
        solved: (B, K, N) float32, means over the repeats, NaN where not played.
        scores: (B, K) float32, means over the problems; of those left out what was expected then.
        racing: (B,) bool, False for those that were left out before their end: their scores are
            estimates and enter no archive.
        whole: every problem of the config was meant to be played.
    """

    played: Rollout
    solved: np.ndarray
    scores: np.ndarray
    racing: np.ndarray
    whole: bool

    @property
    def problems(self) -> int:
        """Problems evaluated, as of `problems_of`."""
        return problems_of(self.played)

    @property
    def offered(self) -> np.ndarray:
        """Scores as the archives are to see them: NaN, which never enters, where left out."""
        return np.where(self.racing[:, None], self.scores, np.float32(np.nan))

    def problems_of(self, child: int) -> list[int] | None:
        """Problems of every task that a child's scores rest on; None where these are all."""
        counts = (~np.isnan(self.solved[child])).sum(axis=1).tolist()
        return None if self.whole and self.racing[child] else counts


class Fitness:
    """Scores the batches of one search.

    Args:
        config: the run's.
        evaluator: plays problems.
        problems: the search's, of every task.
    """

    def __init__(self, config: RunConfig, evaluator: Evaluator, problems: Problems) -> None:
        self._config = config
        self._evaluator = evaluator
        self._problems = problems
        self._names = list(config.tasks)
        self._orders: dict[str, np.ndarray] = {}

    def kept(self, solved: np.ndarray) -> dict[str, jax.Array]:
        """What the repertoire has to keep of a batch's results (B, K, N), as extra scores."""
        config = self._config
        believes = config.racing is not None and config.racing < 1.0
        return {SOLVED: jnp.asarray(solved)} if config.subsets or believes else {}

    def begin(self, solved: np.ndarray) -> np.ndarray:
        """Take up the experts' results, which decide the order; their scores for the archives.

        Args:
            solved: (experts, K, N), on all problems.

        Returns:
            (experts, K) float32, on the problems of the first generation.
        """
        for k, name in enumerate(self._names):
            dice = np.random.default_rng([self._config.seed, _ORDER, k])
            strata = strata_of(self._problems[name], solved[:, k])
            self._orders[name] = stratified_order(strata, dice)
        return self._means(solved, self.size(1))

    @property
    def orders(self) -> dict[str, list[int]]:
        """Task → its problems in the order of play; with these a resumed search goes on."""
        return {name: order.tolist() for name, order in self._orders.items()}

    def resume(self, orders: Mapping[str, Sequence[int]]) -> None:
        """Take up `orders` of the search that was interrupted."""
        self._orders = {name: np.asarray(order) for name, order in orders.items()}

    def size(self, generation: int) -> int:
        """Problems a task that children of a generation are scored on."""
        config = self._config
        sizes = (*config.subsets, config.problems)
        return sizes[sum(generation >= start for start in config.grows_at)]

    def score(self, children: Any, generation: int, repertoire: CyclicRepertoire) -> Scored:
        """Score one generation.

        Args:
            children: gains, leaves (B, ...).
            generation: which.
            repertoire: the archives they are for.
        """
        config, size = self._config, self.size(generation)
        phase = f"generation-{generation:06d}"
        racing = np.ones(jax.tree.leaves(children)[0].shape[0], bool)
        estimates = np.full((len(racing), len(self._names)), np.nan, np.float32)
        if config.racing is None and size == config.problems:
            played = self._evaluator.population(children, self._problems, phase=phase)
            solved = results_of(played, self._names)
            return Scored(played, solved, played.scores, racing, True)
        belief = self._belief(repertoire, size)
        sequence = self._sequence(size, belief)
        block = len(self._names) * (size if config.racing is None else config.racing_block)
        parts: list[Rollout] = []
        for number, start in enumerate(range(0, len(sequence), block)):
            chosen = self._chosen(racing, sequence[start : start + block])
            parts.append(
                self._evaluator.population(
                    children, self._problems, phase=phase, chosen=chosen, more=bool(parts)
                )
            )
            solved = results_of(together(parts), self._names)
            if start + block < len(sequence):
                dice = np.random.default_rng([config.seed, _BELIEF, generation, number])
                may_enter, now = self._look(solved, size, repertoire, belief, dice)
                estimates[racing] = now[racing]
                racing &= may_enter
            if not racing.any():
                break
        scores = np.where(racing[:, None], self._means(solved, size), estimates)
        return Scored(together(parts), solved, scores, racing, size == config.problems)

    def grow(
        self, repertoire: CyclicRepertoire, generation: int
    ) -> tuple[CyclicRepertoire, Rollout | None]:
        """Bring the elites to the problems of a generation.

        Returns:
            The archives to breed from, and what was played: None where nothing grows.
        """
        size = self.size(generation)
        if generation == 1 or size == self.size(generation - 1):
            return repertoire, None
        slots = np.flatnonzero(np.asarray(repertoire.occupied))
        elites = repertoire.gather(jnp.asarray(slots))
        extra = {name: kept[slots] for name, kept in repertoire.extra_scores.items()}
        known = np.asarray(extra[SOLVED])
        wanted = self._chosen(np.ones(len(slots), bool), self._sequence(size, None))
        chosen = {name: wanted[name] & np.isnan(known[:, k]) for k, name in enumerate(self._names)}
        played = self._evaluator.population(
            elites, self._problems, phase=f"growth-{generation:06d}", chosen=chosen
        )
        found = results_of(played, self._names)
        solved = np.where(np.isnan(found), known, found)
        scores = jnp.asarray(self._means(solved, size))
        grown = CyclicRepertoire.init(
            elites,
            scores,
            scores,
            repertoire.tessellation,
            {**extra, SOLVED: jnp.asarray(solved)},
            capacity=repertoire.capacity,
            keys_extra_scores=repertoire.keys_extra_scores,
        )
        return grown, played

    def _belief(self, repertoire: CyclicRepertoire, size: int) -> Belief | None:
        if SOLVED not in repertoire.extra_scores or self._config.racing in (None, 1):
            return None
        slots = np.flatnonzero(np.asarray(repertoire.occupied))
        solved = np.asarray(repertoire.extra_scores[SOLVED][jnp.asarray(slots)])
        return believe(self._subset(solved, size))

    def _sequence(self, size: int, belief: Belief | None) -> np.ndarray:
        """Numbers of task and problem in the order of play, (K size, 2)."""
        orders = [self._orders[name][:size] for name in self._names]
        if belief is None:
            return np.array([(k, order[i]) for i in range(size) for k, order in enumerate(orders)])
        listed = np.array(
            [(k, problem) for k, order in enumerate(orders) for problem in sorted(order)]
        )
        return listed[informative_order(belief)]

    def _chosen(self, rows: np.ndarray, sequence: np.ndarray) -> dict[str, np.ndarray]:
        block = np.zeros((len(self._names), self._config.problems), bool)
        block[sequence[:, 0], sequence[:, 1]] = True
        return {name: rows[:, None] & block[k] for k, name in enumerate(self._names)}

    def _subset(self, solved: np.ndarray, size: int) -> np.ndarray:
        """The first problems of every task's order, as they are listed: (B, K, size)."""
        # As listed, so that the mean over all problems is rounded as that of a rollout.
        kept = [
            solved[:, k, np.sort(self._orders[name][:size])] for k, name in enumerate(self._names)
        ]
        return np.stack(kept, axis=1)

    def _means(self, solved: np.ndarray, size: int) -> np.ndarray:
        scores: np.ndarray = self._subset(solved, size).mean(axis=2)
        return scores

    def _look(
        self,
        solved: np.ndarray,
        size: int,
        repertoire: CyclicRepertoire,
        belief: Belief | None,
        dice: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which children may still enter an archive, and what is to be expected of all scores."""
        state = np.asarray(repertoire.scores), np.asarray(repertoire.cells)
        results = self._subset(solved, size)
        ends = [final_range(results[:, k]) for k in range(results.shape[1])]
        lower, upper = (np.stack(end, axis=1) for end in zip(*ends, strict=True))
        possible = can_enter(repertoire.tessellation, *state, lower, upper)
        if belief is None:
            return possible, _means_so_far(results)
        assert self._config.racing is not None
        finals = draw_finals(dice, belief, results, _DRAWS)
        chance = chance_of_entering(repertoire.tessellation, *state, finals)
        return possible & (chance > 1.0 - self._config.racing), finals.mean(axis=0)


def _means_so_far(results: np.ndarray) -> np.ndarray:
    known = ~np.isnan(results)
    total = np.where(known, results, 0.0).sum(axis=2)
    with np.errstate(invalid="ignore"):
        means: np.ndarray = (total / known.sum(axis=2)).astype(np.float32)
    return means


def results_of(played: Rollout, tasks: Sequence[str]) -> np.ndarray:
    """What each candidate made of each problem: (candidates, K, N), NaN where not played."""
    return np.stack([played.solved[name] for name in tasks], axis=1)


def problems_of(played: Rollout) -> int:
    """Problems that were played, of all candidates and tasks; repeats do not count."""
    return sum(int((~np.isnan(solved)).sum()) for solved in played.solved.values())
