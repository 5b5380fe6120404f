"""Which models of a finished search are put forward, decided on the ``validation`` split alone.

A child's score in the archives is a maximum over many noisy draws; finalists are therefore scored
again, on problems the search never met, and the winner of that is the run's best model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.merging.spectral import gain_layout, uniform_gains
from cycleqd_jax.progress import Progress
from cycleqd_jax.qd.aggregation import aggregate, best_elites
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.runs.evaluate import Evaluator, Problems
from cycleqd_jax.runs.workspace import Workspace


@dataclass(frozen=True)
class Choice:
    """A chosen model.

    Attributes:
        gains: its genotype.
        scores: (tasks,) on the problems it was chosen on.
        details: facts for its model card.
    """

    gains: Any
    scores: list[float]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finals:
    """The two models CycleQD puts forward."""

    best: Choice
    aggregate: Choice


def choose_finals(
    workspace: Workspace, evaluator: Evaluator, repertoire: CyclicRepertoire, problems: Problems
) -> Finals:
    """Score the elites with the highest mean again and pick the best; merge the archives' bests."""
    means = np.where(
        np.asarray(repertoire.occupied), np.asarray(repertoire.scores).mean(axis=1), -np.inf
    )
    count = min(workspace.config.finalists, int(np.isfinite(means).sum()))
    slots = np.argsort(-means, kind="stable")[:count]
    heads = best_elites(repertoire)
    quality = repertoire.scores[heads, jnp.arange(repertoire.num_archives)]
    merged = aggregate(repertoire.gather(heads), quality, workspace.config.preset.temperature)
    pool = jax.tree.map(
        lambda elites, one: jnp.concatenate([elites, one[None]]),
        repertoire.gather(jnp.asarray(slots)),
        merged,
    )
    scores = _score("finalists", evaluator, pool, problems)
    winner = int(np.argmax(scores[:count].mean(axis=1)))
    ids = np.asarray(repertoire.extra_scores["id"])
    return Finals(
        best=_choice(pool, scores, winner, id=int(ids[slots[winner]])),
        aggregate=_choice(pool, scores, count, ids=[int(ids[slot]) for slot in heads]),
    )


def choose_uniform(workspace: Workspace, evaluator: Evaluator, problems: Problems) -> Choice:
    """Pick the strongest ``θ0 + λ Σ τ_e`` over the configured λ."""
    scales = workspace.config.uniform_scales
    pool = jax.vmap(partial(uniform_gains, gain_layout(workspace.basis)))(jnp.asarray(scales))
    scores = _score("uniform merges", evaluator, pool, problems)
    winner = int(np.argmax(scores.mean(axis=1)))
    return _choice(pool, scores, winner, scale=scales[winner])


def _score(name: str, evaluator: Evaluator, pool: Any, problems: Problems) -> np.ndarray:
    with Progress(name, jax.tree.leaves(pool)[0].shape[0]) as progress:
        return evaluator.population(
            pool, problems, lambda done: progress.advance(done - progress.completed)
        ).scores


def _choice(pool: Any, scores: np.ndarray, index: int, **details: Any) -> Choice:
    gains = jax.tree.map(lambda leaf: leaf[index], pool)
    return Choice(gains, [float(score) for score in scores[index]], details)
