"""Which models of a finished search are put forward, decided on the ``validation`` split alone.

A child's score in the archives is a maximum over many noisy draws; finalists are therefore scored
again, on problems the search never met. The winner of that is the run's best model, those that
complement each other most are its team, and the best of every archive merged are its aggregate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.merging.spectral import uniform_gains
from cycleqd_jax.progress import Progress
from cycleqd_jax.qd.aggregation import aggregate, best_elites
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.qd.team import select_team
from cycleqd_jax.runs.evaluate import Evaluator, Problems
from cycleqd_jax.runs.failures import Failures
from cycleqd_jax.runs.workspace import Workspace
from cycleqd_jax.tasks.played import Rollout


@dataclass(frozen=True)
class Choice:
    """A chosen model.

    Attributes:
        gains: its genotype.
        scores: (tasks,) on the problems it was chosen on.
        details: where it comes from: ``id`` in the lineage, ``ids`` of what it was merged from, or
            its ``scale``; in JSON types.
    """

    gains: Any
    scores: list[float]
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Everything but the gains, which follow from the lineage."""
        return {**self.details, "scores": dict(zip(tasks, self.scores, strict=True))}


@dataclass(frozen=True)
class ChosenTeam:
    """Finalists that complement each other.

    Attributes:
        ids: of the members, the one that adds most first; none where nobody solved anything.
        gains: problems each member solves that none before it does.
        covered: problems that at least one member solves.
        problems: problems there were.
        optimal: no team of the size asked for solves more.
    """

    ids: list[int]
    gains: list[int]
    covered: int
    problems: int
    optimal: bool


@dataclass(frozen=True)
class Finals:
    """What CycleQD puts forward.

    Attributes:
        best: the finalist with the best mean.
        aggregate: the merge of every archive's best.
        team: finalists that solve together what no model solves alone.
        finalists: scores of every finalist by its id.
    """

    best: Choice
    aggregate: Choice
    team: ChosenTeam
    finalists: Mapping[int, list[float]]


def choose_finals(
    workspace: Workspace, evaluator: Evaluator, repertoire: CyclicRepertoire, problems: Problems
) -> Finals:
    """Score the elites with the highest mean and every archive's best again, and choose.

    Raises:
        GenerationFailed: none of them could be scored.
    """
    config = workspace.config
    means = np.where(
        np.asarray(repertoire.occupied), np.asarray(repertoire.scores).mean(axis=1), -np.inf
    )
    count = min(config.finalists, int(np.isfinite(means).sum()))
    slots = np.argsort(-means, kind="stable")[:count].tolist()
    heads = best_elites(repertoire)
    # The best of an archive may be a specialist of low mean: a team wants it.
    slots += [slot for slot in dict.fromkeys(heads.tolist()) if slot >= 0 and slot not in slots]
    quality = repertoire.scores[heads, jnp.arange(repertoire.num_archives)]
    merged = aggregate(repertoire.gather(heads), quality, config.preset.temperature)
    pool = jax.tree.map(
        lambda elites, one: jnp.concatenate([elites, one[None]]),
        repertoire.gather(jnp.asarray(slots, jnp.int32)),
        merged,
    )
    played = _play("finalists", evaluator, pool, problems)
    scores, last = played.scores, len(slots)
    ids = np.asarray(repertoire.extra_scores["id"])
    numbers = ids[slots].tolist()
    winner = _best(scores[:last])
    return Finals(
        best=_choice(pool, scores, winner, id=numbers[winner]),
        aggregate=_choice(pool, scores, last, ids=ids[np.asarray(heads)].tolist()),
        team=_team(played, numbers, config.team),
        finalists=dict(zip(numbers, scores[:last].tolist(), strict=True)),
    )


def choose_uniform(workspace: Workspace, evaluator: Evaluator, problems: Problems) -> Choice:
    """Pick the strongest ``θ0 + λ Σ τ_e`` over the configured λ.

    Raises:
        GenerationFailed: none of them could be scored.
    """
    scales = workspace.config.uniform_scales
    pool = jax.vmap(partial(uniform_gains, workspace.layout))(jnp.asarray(scales))
    scores = _play("uniform merges", evaluator, pool, problems).scores
    winner = _best(scores)
    return _choice(pool, scores, winner, scale=scales[winner])


def _team(played: Rollout, ids: list[int], size: int) -> ChosenTeam:
    # Solved is solved wholly; the last row is the aggregate, which no lineage holds.
    table = np.concatenate([solved[: len(ids)] >= 1.0 for solved in played.solved.values()], axis=1)
    means = np.nan_to_num(played.scores[: len(ids)], nan=0.0, posinf=0.0, neginf=0.0)
    team = select_team(table, size, means)
    return ChosenTeam(
        ids=[ids[index] for index in team.indices],
        gains=team.gains.tolist(),
        covered=team.covered,
        problems=table.shape[1],
        optimal=team.optimal,
    )


def _play(name: str, evaluator: Evaluator, pool: Any, problems: Problems) -> Rollout:
    with Progress(name, jax.tree.leaves(pool)[0].shape[0]) as progress:
        played = evaluator.population(
            pool, problems, lambda done: progress.advance(done - progress.completed), phase=name
        )
    Failures.of(played).refuse_blindness(f"the {name}", played)
    return played


def _best(scores: np.ndarray) -> int:
    means = scores.mean(axis=1)
    return int(np.argmax(np.where(np.isfinite(means), means, -np.inf)))


def _choice(pool: Any, scores: np.ndarray, index: int, **details: Any) -> Choice:
    gains = jax.tree.map(lambda leaf: leaf[index], pool)
    return Choice(gains, [float(score) for score in scores[index]], details)
