"""Racing: which children of a batch need not be played to their end, as rules of score tables.

A child's score on a task is the mean over N problems. It enters archive k only if its quality is
strictly above the elite's in the cell that its other scores choose (`qd.insertion`). Two rules say
before all is known that this will not happen:

`can_enter`, a bound: unplayed problems may all be 0 or all be 1. Archives are then those of full
evaluation bit for bit. Siblings are not looked at: who is out would have entered nowhere, so it
would neither have displaced nor have blocked any of them.

`chance_of_entering`, a belief: a child solves mostly what its parents solve. Problems are told
apart by what the parents made of them (both fail, they differ, both solve), and in each of these
three groups the child's share of solved problems has a Beta prior, so that what is unplayed is
beta-binomial given what was played (post-stratification; Gelman et al., "Bayesian Data Analysis",
3rd edition, sections 2.4 and 8.3). Of children stopped at a chance of δ or less, a share of at most
δ would have entered, as far as the model is right.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.qd.grid import Grid
from cycleqd_jax.qd.insertion import incumbent_quality
from cycleqd_jax.qd.tessellation import Tessellation

PRIOR = np.array([[0.6, 5.4], [3.0, 3.0], [5.4, 0.6]])
"""Pseudo-counts (solved, failed) where both parents fail, where they differ and where both solve.
In the quickstart children solved 2 to 14%, 39 to 56% and 93 to 97% of these."""


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


def draw_finals(
    dice: np.random.Generator, results: np.ndarray, parents: np.ndarray, draws: int
) -> np.ndarray:
    """Final scores on one task, drawn from what is believed of each child.

    Problems in between 0 and 1 are believed to be one or the other, which is the widest belief of
    their mean.

    Args:
        dice: random numbers.
        results: (B, N) in [0, 1], NaN where nothing was played yet.
        parents: (B, N), the mean of what the two parents scored; NaN where that is not known.
        draws: how many, D.

    Returns:
        (D, B) float32.
    """
    # NaN compares false: nothing known of the parents is no agreement.
    group = np.where(parents <= 0.0, 0, np.where(parents >= 1.0, 2, 1))
    played = ~np.isnan(results)
    total = np.where(played, results, 0.0).sum(axis=1)[None].repeat(draws, axis=0)
    for number, (solved, failed) in enumerate(PRIOR):
        member = group == number
        won = np.where(member & played, results, 0.0).sum(axis=1)
        lost = (member & played).sum(axis=1) - won
        share = dice.beta(solved + won, failed + lost, size=(draws, len(results)))
        total += dice.binomial((member & ~played).sum(axis=1), share)
    return (total / results.shape[1]).astype(np.float32)


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
