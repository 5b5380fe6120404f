"""Racing: which children of a batch need not be played to their end, as rules of score tables.

A child's score on a task is the mean over N problems. It enters archive k only if its quality is
strictly above the elite's in the cell that its other scores choose (`qd.insertion`). Two rules say
before all is known that this will not happen:

`can_enter`, a bound: unplayed problems may all be 0 or all be 1. Archives are then those of full
evaluation bit for bit. Siblings are not looked at: who is out would have entered nowhere, so it
would neither have displaced nor have blocked any of them.

`chance_of_entering`, a belief: who solves one problem often solves another too, and the elites show
which go together. Their results give a normal distribution of a child's; given what was played it
says what to expect of the rest, on all tasks at once. It also says which problems tell most of the
final scores, so that these are played first (Cohn, Ghahramani and Jordan, "Active learning with
statistical models", JAIR 4, 1996; for benchmarks of language models: Polo et al., "tinyBenchmarks",
ICML 2024, arXiv 2402.14992). Of children stopped at a chance of δ or less, a share of at most δ
would have entered, as far as the belief is right.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.qd.grid import Grid
from cycleqd_jax.qd.insertion import incumbent_quality
from cycleqd_jax.qd.tessellation import Tessellation

# Few elites say little of N K results: their covariance counts for its diagonal alone by a share,
# with some noise of its own and as much prior as a few elites (a variance of 0.1 about a half).
_DIAGONAL_SHARE = 0.2
_NOISE = 0.02
_PRIOR_ELITES, _PRIOR_MEAN, _PRIOR_VARIANCE = 4, 0.5, 0.1
# Keeps a covariance of next to nothing left positive.
_JITTER = 1e-9


class Belief(NamedTuple):
    """What a child's M = K N results are expected to be, task after task.

    Attributes:
        mean: (M,).
        covariance: (M, M).
        tasks: K.
    """

    mean: np.ndarray
    covariance: np.ndarray
    tasks: int

    @property
    def to_scores(self) -> np.ndarray:
        """(K, M), which turns results into scores."""
        problems = len(self.mean) // self.tasks
        return np.kron(np.eye(self.tasks), np.full((1, problems), 1.0 / problems))


def final_range(results: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest score each child may end with.

    Args:
        results: (B, N) float32 in [0, 1], NaN where nothing was played yet.

    Returns:
        Two (B,) float32, means over the problems. Rounding is monotone: what is still unplayed
        cannot lead out of them by as much as a bit.
    """
    unplayed = np.isnan(results)
    least, most = (np.where(unplayed, np.float32(end), results).mean(axis=1) for end in (0, 1))
    return least, most


def can_enter(
    grid: Grid, scores: np.ndarray, cells: np.ndarray, lower: np.ndarray, upper: np.ndarray
) -> np.ndarray:
    """Whether final scores between two ends could enter an archive.

    Args:
        grid: the cells.
        scores: (P, K) scores of the pool.
        cells: (K, C) pool index of each archive's elites, -1 = empty.
        lower: (B, K) float32, the least final scores.
        upper: (B, K) float32, the greatest.

    Returns:
        (B,) bool.
    """
    quality = np.asarray(incumbent_quality(jnp.asarray(scores), jnp.asarray(cells)))
    edges = np.asarray(grid.edges)
    # Bins are monotone in the score, so those between the ends' are all that can be reached.
    first, last = ((edges[None] < end[:, :, None]).sum(axis=2) for end in (lower, upper))
    axes = np.arange(grid.bins)
    reached = (first[..., None] <= axes) & (axes <= last[..., None])
    tasks = grid.num_tasks
    places = np.unravel_index(np.arange(grid.num_cells), (grid.bins,) * (tasks - 1))
    enters = np.zeros(len(lower), bool)
    for k in range(tasks):
        open_cells = upper[:, k, None] > quality[k]
        others = [task for task in range(tasks) if task != k]
        for j, place in zip(others, places, strict=True):
            open_cells &= reached[:, j, place]
        enters |= open_cells.any(axis=1)
    return enters


def believe(elites: np.ndarray) -> Belief:
    """The belief that the elites' results suggest.

    Args:
        elites: (E, K, N) in [0, 1].
    """
    count, tasks, problems = elites.shape
    rows = elites.reshape(count, -1).astype(np.float64)
    mean = rows.mean(axis=0)
    spread = (rows - mean).T @ (rows - mean)
    size = tasks * problems
    weight = count + _PRIOR_ELITES
    covariance = (spread + _PRIOR_ELITES * _PRIOR_VARIANCE * np.eye(size)) / weight
    diagonal = np.diag(np.diag(covariance))
    shrunk = (1 - _DIAGONAL_SHARE) * covariance + _DIAGONAL_SHARE * diagonal
    return Belief(
        mean=(count * mean + _PRIOR_ELITES * _PRIOR_MEAN) / weight,
        covariance=shrunk + _NOISE * np.eye(size),
        tasks=tasks,
    )


def informative_order(belief: Belief) -> np.ndarray:
    """All M results, each the one that, given those before it, tells most of the final scores.

    It takes most of the variance from the sum over the tasks; the first on a tie.
    """
    left, to_scores = belief.covariance.copy(), belief.to_scores
    order = np.empty(len(left), np.int64)
    taken = np.zeros(len(left), bool)
    for place in range(len(left)):
        gain = ((to_scores @ left) ** 2).sum(axis=0) / np.maximum(np.diag(left), _JITTER)
        best = int(np.where(taken, -np.inf, gain).argmax())
        order[place], taken[best] = best, True
        left -= np.outer(left[:, best], left[best]) / max(left[best, best], _JITTER)
    return order


def draw_finals(
    dice: np.random.Generator, belief: Belief, results: np.ndarray, draws: int
) -> np.ndarray:
    """Final scores drawn from what is believed of each child, in whole problems.

    Args:
        dice: random numbers.
        belief: of the same K tasks and N problems.
        results: (B, K, N) in [0, 1], NaN where nothing was played yet: the same ones of every
            child.
        draws: how many, D.

    Returns:
        (D, B, K) float32.
    """
    batch, tasks, problems = results.shape
    rows = results.reshape(batch, -1).astype(np.float64)
    played = ~np.isnan(rows).all(axis=0)
    known, rest, cov = np.flatnonzero(played), np.flatnonzero(~played), belief.covariance
    pull = np.linalg.solve(cov[np.ix_(known, known)], cov[np.ix_(known, rest)])
    to_scores = belief.to_scores
    so_far = rows[:, known] @ to_scores[:, known].T
    expected = belief.mean[rest] + (rows[:, known] - belief.mean[known]) @ pull
    mean = so_far + np.clip(expected, 0.0, 1.0) @ to_scores[:, rest].T
    unknown = cov[np.ix_(rest, rest)] - cov[np.ix_(rest, known)] @ pull
    spread = to_scores[:, rest] @ unknown @ to_scores[:, rest].T + _JITTER * np.eye(tasks)
    noise = dice.standard_normal((draws, batch, tasks)) @ np.linalg.cholesky(spread).T
    most = so_far + to_scores[:, rest].sum(axis=1)
    finals = np.clip(np.round((mean + noise) * problems) / problems, so_far, most)
    return finals.astype(np.float32)


def chance_of_entering(
    tessellation: Tessellation, scores: np.ndarray, cells: np.ndarray, finals: np.ndarray
) -> np.ndarray:
    """How many of the drawn final scores would enter an archive.

    Args:
        tessellation: the cells.
        scores: (P, K) scores of the pool.
        cells: (K, C) pool index of each archive's elites, -1 = empty.
        finals: (D, B, K) float32, drawn final scores.

    Returns:
        (B,) shares of the D draws.
    """
    draws, batch, tasks = finals.shape
    rows = jnp.asarray(finals.reshape(draws * batch, tasks))
    quality = incumbent_quality(jnp.asarray(scores), jnp.asarray(cells))
    enters = np.asarray(_beats(tessellation, quality, rows))
    return enters.reshape(draws, batch).mean(axis=0)


@jax.jit
def _beats(tessellation: Tessellation, quality: jax.Array, rows: jax.Array) -> jax.Array:
    found = [
        rows[:, k] > quality[k][tessellation.cell_of(rows, k)] for k in range(quality.shape[0])
    ]
    return jnp.stack(found).any(axis=0)
