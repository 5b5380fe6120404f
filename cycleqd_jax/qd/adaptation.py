"""Adaptation: a CMA-ES for every archive, fed with what its candidates' children achieved.

**Rank.** A child earns in every archive: in an occupied cell the share of the task's range by
which it beats the incumbent, or 0; in an empty cell ``new_cell`` plus its quality's share of the
range, or 0 if it is below the range. With ``new_cell = 1`` a new cell comes before any improvement
inside the range, QDax's convention. The sum over the K archives, all compared before the batch
enters, is averaged over the candidate's children. Candidates that earn the same are ranked by how
little their children fell short of the incumbents. A child with a score that is not finite earns
nothing and falls short by K.

**Update.** The children of archive k take its candidates in turn, over as many generations as it
needs; after ``population * children`` of them the CMA-ES is told and new candidates are drawn. All
children of a generation come from one population, so a large batch gives each candidate several.

**Restart.** After ``patience`` populations in a row without any child that earned something, or
when the CMA-ES has left the finite numbers, it begins anew at the start parameters. When its step
has become too small to tell candidates apart, so large that they lie in the ranges' corners, or
too elongated for float32, only step and covariance begin anew: what is good for an archive changes
as it fills.
"""

import dataclasses
import functools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from qdax.baselines.cmaes import CMAES

from cycleqd_jax.qd.emitter import CycleQDState
from cycleqd_jax.qd.insertion import incumbent_quality
from cycleqd_jax.qd.schedule import Schedule
from cycleqd_jax.qd.tessellation import Tessellation

SMALLEST_STEP, LARGEST_STEP = 1e-3, 6.0
"""Range of a useful step: sigmoid(6) is the upper end of a range but for a quarter of a percent."""

LARGEST_CONDITION = 1e6
"""Ratio of eigenvalues up to which float32 can factorise a covariance."""


@dataclasses.dataclass(frozen=True)
class ControlSettings:
    """Settings of every archive's CMA-ES, see the module.

    Attributes:
        population: candidates; None: ``4 + floor(3 ln n)`` for a map of n numbers.
        sigma: first step, in outputs of the map (1 moves a parameter by a quarter of its range).
        children: children that every candidate gets at least before it is judged.
        patience: populations in a row without improvement before a restart.
        new_cell: what a new cell earns, in shares of a task's range.
    """

    population: int | None = None
    sigma: float = 0.5
    children: int = 1
    patience: int = 10
    new_cell: float = 1.0

    def __post_init__(self) -> None:
        if self.population is not None and self.population < 2:
            raise ValueError(f"expected a population of at least 2, found {self.population}")
        if not SMALLEST_STEP < self.sigma < LARGEST_STEP:
            raise ValueError(
                f"expected sigma between {SMALLEST_STEP} and {LARGEST_STEP}, found {self.sigma}"
            )
        for name in ("children", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.new_cell < 0:
            raise ValueError(f"new_cell must not be negative, found {self.new_cell}")


class ControlState(CycleQDState):
    """State of the emitter: arrays only, with one row an archive.

    Attributes:
        generation: int32 scalar, generations told so far.
        key: random key, for drawing candidates.
        cmaes: QDax's ``CMAESState`` with leaves (K, ...).
        candidates: (K, L, n) the population; row l is a flattened map ``M``.
        children: (K, L) int32, children of each candidate that were told.
        earned: (K, L) sum of what they earned.
        shortfall: (K, L) sum of what they fell short by, not positive.
        stalled: (K,) int32, populations in a row without improvement.
        restarts: (K,) int32, times the CMA-ES began anew at the start parameters.
        incumbents: (K, C) quality in every cell, -inf in empty ones.
    """

    key: Any
    cmaes: Any
    candidates: Any
    children: Any
    earned: Any
    shortfall: Any
    stalled: Any
    restarts: Any
    incumbents: Any


@partial(jax.jit, static_argnames=("settings", "size"))
def begin(
    settings: ControlSettings,
    size: int,
    key: jax.Array,
    pool_scores: Float[Array, "capacity tasks"],
    cells: Int[Array, "tasks cells"],
) -> ControlState:
    """State at generation 0, all CMA-ES at the start parameters.

    Args:
        settings: settings of the CMA-ES.
        size: numbers n in a candidate.
        key: random key, kept in the state.
        pool_scores: scores of the pool.
        cells: pool index of each archive's cells.
    """
    archives = cells.shape[0]
    next_key, draw_key = jax.random.split(key)
    cmaes = _fresh(settings, archives, size)
    candidates = _draw(settings, cmaes, draw_key)
    blank = jnp.zeros(candidates.shape[:2], jnp.float32)
    return ControlState(
        generation=jnp.zeros((), jnp.int32),
        key=next_key,
        cmaes=cmaes,
        candidates=candidates,
        children=blank.astype(jnp.int32),
        earned=blank,
        shortfall=blank,
        stalled=jnp.zeros(archives, jnp.int32),
        restarts=jnp.zeros(archives, jnp.int32),
        incumbents=incumbent_quality(pool_scores, cells),
    )


@functools.lru_cache
def _optimiser(settings: ControlSettings, size: int) -> CMAES:
    population = settings.population or 4 + int(3 * math.log(size))
    with jax.ensure_compile_time_eval():  # its constants must not belong to somebody's trace
        return CMAES(population, size, fitness_function=None, init_sigma=settings.sigma)


def _fresh(settings: ControlSettings, archives: int, size: int) -> Any:
    start = _optimiser(settings, size).init()
    # QDax gives Python numbers here and there; a carried state needs arrays of one dtype.
    start = start.replace(
        num_updates=jnp.int32(0), eigen_updates=jnp.int32(0), sigma=jnp.float32(start.sigma)
    )
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (archives, *x.shape)), start)


def _draw(settings: ControlSettings, cmaes: Any, key: jax.Array) -> jax.Array:
    archives, size = cmaes.mean.shape
    sample = jax.vmap(_optimiser(settings, size).sample)
    return sample(cmaes, jax.random.split(key, archives))


def turns(
    children: Int[Array, "archives population"], archive: Int[Array, " batch"]
) -> Int[Array, " batch"]:
    """Candidate of every child: those of its archive in turn, over generations.

    Args:
        children: children told so far to each candidate of the present populations.
        archive: archive each child is bred in.
    """
    archives, population = children.shape
    mine = jax.nn.one_hot(archive, archives, dtype=jnp.int32)
    before = jnp.take_along_axis(jnp.cumsum(mine, axis=0), archive[:, None], axis=1)[:, 0] - 1
    return (jnp.sum(children, axis=1)[archive] + before) % population


def _cells(
    tessellation: Tessellation, scores: Float[Array, "batch tasks"]
) -> Int[Array, "tasks batch"]:
    tasks = jnp.arange(tessellation.num_tasks, dtype=jnp.int32)
    return jax.vmap(tessellation.cell_of, in_axes=(None, 0))(scores, tasks)


def improvements(
    tessellation: Tessellation,
    incumbents: Float[Array, "tasks cells"],
    scores: Float[Array, "batch tasks"],
    new_cell: float = 1.0,
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """What children bring to all archives as they were before, and how far they fall short.

    Args:
        tessellation: the cells.
        incumbents: (K, C) quality in every cell, -inf in empty ones.
        scores: (B, K) the children's.
        new_cell: what a new cell earns, in shares of the task's range.

    Returns:
        Earned (B,), not negative, and shortfall (B,), between -K and 0; see the module.
    """
    valid = jnp.isfinite(scores).all(axis=1)
    quality = jnp.where(valid[:, None], scores, 0.0)
    lower, upper = tessellation.lower, tessellation.upper
    span = jnp.where(upper > lower, upper - lower, 1.0)
    rival = jnp.take_along_axis(incumbents, _cells(tessellation, quality), axis=1).T
    empty = rival == -jnp.inf
    ahead = (quality - jnp.where(empty, lower, rival)) / span
    earned = jnp.sum(jnp.maximum(ahead, 0.0) + jnp.where(empty, new_cell, 0.0), axis=1)
    short = jnp.sum(jnp.where(empty, 0.0, jnp.clip(ahead, -1.0, 0.0)), axis=1)
    return jnp.where(valid, earned, 0.0), jnp.where(valid, short, -float(scores.shape[1]))


@partial(jax.jit, static_argnames=("schedule", "settings"))
def learn(
    state: ControlState,
    tessellation: Tessellation,
    pool_scores: Float[Array, "capacity tasks"],
    cells: Int[Array, "tasks cells"],
    scores: Float[Array, "batch tasks"],
    *,
    schedule: Schedule,
    settings: ControlSettings,
) -> ControlState:
    """Credit the children to their candidates; tell the CMA-ES of archives that heard enough.

    Args:
        state: before the batch.
        tessellation: the cells.
        pool_scores: scores of the pool, after the batch was offered.
        cells: pool index of each archive's cells, after the batch was offered.
        scores: (B, K) of the children, in the order they were bred.
        schedule: the one they were bred with.
        settings: settings of the CMA-ES.
    """
    archives, population, _ = state.candidates.shape
    archive = schedule(state.generation, scores.shape[0], archives)
    where = archive, turns(state.children, archive)
    earned, short = improvements(tessellation, state.incumbents, scores, settings.new_cell)
    children = state.children.at[where].add(1)
    total_earned = state.earned.at[where].add(earned)
    total_short = state.shortfall.at[where].add(short)

    ready = jnp.sum(children, axis=1) >= population * settings.children
    counts = jnp.maximum(children, 1)
    cmaes = _tell(settings, state, total_earned / counts, total_short / counts)
    stalled = jnp.where(jnp.any(total_earned > 0, axis=1), 0, state.stalled + 1)
    cmaes, restarted = _renew(settings, cmaes, stalled >= settings.patience)
    next_key, draw_key = jax.random.split(state.key)
    changed = state.replace(
        cmaes=cmaes,
        candidates=_draw(settings, cmaes, draw_key),
        children=jnp.zeros_like(children),
        earned=jnp.zeros_like(total_earned),
        shortfall=jnp.zeros_like(total_short),
        stalled=jnp.where(restarted, 0, stalled),
        restarts=state.restarts + restarted,
    )
    waiting = state.replace(children=children, earned=total_earned, shortfall=total_short)
    told = _choose(ready, _per_archive(changed), _per_archive(waiting))
    return state.replace(
        **told,
        generation=state.generation + 1,
        key=next_key,
        incumbents=incumbent_quality(pool_scores, cells),
    )


_ROWS = "cmaes", "candidates", "children", "earned", "shortfall", "stalled", "restarts"


def _per_archive(state: ControlState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _ROWS}


def _choose(mask: Bool[Array, " archives"], new: Any, old: Any) -> Any:
    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape(-1, *[1] * (b.ndim - 1)), a, b).astype(b.dtype)

    return jax.tree.map(choose, new, old)


def _tell(
    settings: ControlSettings,
    state: ControlState,
    earned: Float[Array, "archives population"],
    short: Float[Array, "archives population"],
) -> Any:
    _, population, size = state.candidates.shape
    order = jnp.lexsort((-short, -earned), axis=-1)[:, : population // 2]
    best = jnp.take_along_axis(state.candidates, order[..., None], axis=1)
    told = jax.vmap(_optimiser(settings, size).update_state)(state.cmaes, best)
    told = told.replace(mean=jnp.clip(told.mean, -LARGEST_STEP, LARGEST_STEP))
    # A population of equals has nothing to tell.
    equal = jnp.ptp(earned, axis=1) + jnp.ptp(short, axis=1) == 0
    return _choose(~equal, told, state.cmaes)


def _renew(
    settings: ControlSettings, cmaes: Any, stalled: Bool[Array, " archives"]
) -> tuple[Any, Bool[Array, " archives"]]:
    archives, size = cmaes.mean.shape
    start = _fresh(settings, archives, size)
    finite = jnp.stack(
        [
            jnp.isfinite(x).reshape(archives, -1).all(axis=1)
            for x in (cmaes.mean, cmaes.cov_matrix, cmaes.sigma, cmaes.p_s, cmaes.eigenvalues)
        ]
    ).all(axis=0)
    largest, smallest = (f(cmaes.eigenvalues, axis=1) for f in (jnp.max, jnp.min))
    step = cmaes.sigma * jnp.sqrt(largest)
    useful = (step >= SMALLEST_STEP) & (step <= LARGEST_STEP)
    useful &= largest <= LARGEST_CONDITION * smallest
    cmaes = _choose(useful, cmaes, start.replace(mean=cmaes.mean))
    restarted = stalled | ~finite
    return _choose(~restarted, cmaes, start), restarted
