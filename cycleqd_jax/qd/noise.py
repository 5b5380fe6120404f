"""Cyclic archives of noisy scores: an elite is replaced by what is better, not by what was lucky.

Where scores are stochastic an elite may owe its cell to one lucky draw, and the archive's best is
the luckiest of all. Here every elite keeps the `Evidence` of all its evaluations, its scores are
their means, the incumbents that a batch challenges are evaluated again, and a challenger must be
better with a chosen confidence. This is adaptive sampling (Justesen, Risi and Mouret, GECCO 2019
companion; Flageat and Cully, arXiv 2302.00463) with a test in place of equal numbers of samples.

One generation by hand; `cycleqd_jax.qd.adaptive_sampling` does the same inside ``lax.scan``:

    evidence = Evidence.of(samples)                      # (n, B, K) scores of the children
    indices = repertoire.challenged(evidence, limit)     # incumbents to evaluate again
    repertoire = repertoire.reassess(indices, Evidence.of(again))
    repertoire = repertoire.add(children, scores, scores, {"evidence": evidence})
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cycleqd_jax.qd.evidence import Belief, Evidence, NoiseModel, probability_better
from cycleqd_jax.qd.insertion import EMPTY, Decision, decide, is_traced, occupied_slots
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.qd.tessellation import Tessellation

EVIDENCE = "evidence"
"""The extra score under which the repertoire keeps the evidence of its elites."""


class NoisyRepertoire(CyclicRepertoire):
    """A `CyclicRepertoire` whose scores are the means of evidence.

    A row enters a cell if it is empty, or if the row's mean quality is strictly better than the
    incumbent's and the probability that it truly is better reaches ``confidence``; of the rows
    that pass, the one with the best mean, the first on a tie. Without any variance these are the
    rules of `CyclicRepertoire`.

    It works inside an unmodified QDax ``MAPElites`` (no incumbent is evaluated again then), in
    ``AdaptiveMAPElites``, and with ask and tell.

    Attributes:
        noise: the noise model, ``Evidence -> Belief``, a pytree.
        confidence: float32 scalar in [0.5, 1).
    """

    noise: Any
    confidence: Any

    @classmethod
    def init(  # type: ignore[override]  # one argument more: there is no noise to assume
        cls,
        genotypes: Any,
        fitnesses: Any,
        descriptors: Any,
        centroids: Any,
        extra_scores: Mapping[str, Any] | None = None,
        *,
        noise: NoiseModel,
        confidence: float = 0.9,
        capacity: int | None = None,
        keys_extra_scores: tuple[str, ...] = (),
        in_place: bool = False,
    ) -> "NoisyRepertoire":
        """Make a repertoire from evaluated genotypes.

        Args:
            genotypes: as for `CyclicRepertoire.init`.
            fitnesses: (B, K) scores; ``evidence.scores`` if evidence is given.
            descriptors: (B, K) the same scores.
            centroids: the cells, a ``Grid`` or a ``CVT``.
            extra_scores: name -> tree with leaves (B, ...); under "evidence" an `Evidence` of B
                rows. Without it every row counts as one evaluation.
            noise: the noise model, see `cycleqd_jax.qd.evidence`.
            confidence: probability of being better that a challenger must reach.
            capacity: as for `CyclicRepertoire.init`.
            keys_extra_scores: further extra scores to keep; evidence always is.
            in_place: as for `CyclicRepertoire.init`.

        Raises:
            ValueError: a confidence outside [0.5, 1), a noise model that does not fit K tasks,
                scores that are not the evidence's, or what `CyclicRepertoire.init` refuses.
        """
        if not 0.5 <= confidence < 1:
            raise ValueError(f"confidence: expected a probability in [0.5, 1), found {confidence}")
        extra = _with_evidence(extra_scores, fitnesses)
        _check_noise(noise, extra[EVIDENCE])
        others = tuple(name for name in keys_extra_scores if name != EVIDENCE)
        # In empty archives the test has nothing to compare with: the plain rules decide.
        plain = CyclicRepertoire.init(
            genotypes,
            fitnesses,
            descriptors,
            centroids,
            extra,
            capacity=capacity,
            keys_extra_scores=(*others, EVIDENCE),
            in_place=in_place,
        )
        fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        return cls(**fields, noise=noise, confidence=jnp.asarray(confidence, jnp.float32))

    @property
    def evidence(self) -> Evidence:
        """Evidence of the pool, (P,) and (P, K); leftovers in free slots."""
        return self.extra_scores[EVIDENCE]

    def add(
        self,
        genotypes: Any,
        descriptors: Any,
        fitnesses: Any,
        extra_scores: Mapping[str, Any] | None = None,
    ) -> "NoisyRepertoire":
        """Offer a batch to all archives; see `PooledRepertoire.add`.

        Args:
            genotypes: tree with leaves (B, ...).
            descriptors: (B, K) scores.
            fitnesses: (B, K) the same scores; ``evidence.scores`` if evidence is given.
            extra_scores: as for `init`.

        Raises:
            ValueError: scores that are not the evidence's (not seen under jit), or what
                `CyclicRepertoire.add` refuses.
        """
        extra = _with_evidence(extra_scores, fitnesses)
        return super().add(genotypes, descriptors, fitnesses, extra)

    def decide(self, batch_scores: Float[Array, "batch tasks"]) -> Decision:
        """Which rows, evaluated once each, would enter which cells; changes nothing."""
        return self._decide(batch_scores, _with_evidence(None, batch_scores))

    def _decide(self, scores: jax.Array, extra_scores: Mapping[str, Any]) -> Decision:
        return _decide_by_test(
            self.tessellation,
            self.scores,
            self.cells,
            self.evidence,
            scores,
            extra_scores[EVIDENCE],
            self.noise,
            self.confidence,
        )

    def challenged(self, evidence: Evidence, limit: int) -> Int[Array, " limit"]:
        """Incumbents that a batch challenges, to be evaluated again before it is added.

        A row challenges the incumbent of its cell, in every archive, if it is better with a
        probability of at least ``1 - confidence``, that is, unless the incumbent is better beyond
        doubt. So evaluations go where a decision is open, and a lucky incumbent, whose few
        evaluations prove little, is called again even by rows with a lower mean.

        Args:
            evidence: the batch's, B rows.
            limit: how many at most, static; those most likely to lose come first.

        Returns:
            Distinct pool indices, -1 after the last.

        Raises:
            ValueError: evidence of another number of tasks, or a limit below 1.
        """
        if limit < 1:
            raise ValueError(f"limit: expected at least 1 incumbent, found {limit}")
        _check_tasks(evidence, self.num_archives)
        return _challenged(
            self.tessellation,
            self.cells,
            self.evidence,
            evidence,
            self.noise,
            self.confidence,
            limit=limit,
        )

    def reassess(self, indices: Any, evidence: Evidence) -> "NoisyRepertoire":
        """Give incumbents further evidence and file all elites again.

        The means move, so an elite may belong to another cell. Holders that still belong to their
        cell keep it; then the whole pool is offered to all archives by the rules of `add`. An
        elite that loses its cell to a better one, or drifts into one whose holder it does not
        beat, is *displaced* in that archive. It stays in the pool, with its evidence, as long as
        a cell of any archive points at it, and is forgotten after that. Genotypes do not move:
        pool indices stay valid.

        Args:
            indices: (M,) distinct pool indices of elites; -1 is skipped.
            evidence: M rows, of the new evaluations alone.

        Raises:
            ValueError: not one row an index, another number of tasks, and outside jit an index
                that is no elite's or is given twice (under jit the first is skipped).
        """
        indices = jnp.asarray(indices, jnp.int32)
        _check_tasks(evidence, self.num_archives)
        if indices.shape != evidence.count.shape:
            raise ValueError(
                f"indices: expected one for each of {evidence.count.shape[0]} rows of evidence, "
                f"found shape {indices.shape}"
            )
        if not (is_traced(indices) or is_traced(self.cells)):
            _check_indices(np.asarray(indices), np.asarray(self.occupied))
        # Only tables go in: copying the pool of genotypes would cost more than all the rest.
        merged, scores, cells = _reassess(
            self.tessellation,
            self.cells,
            self.evidence,
            indices,
            evidence,
            self.noise,
            self.confidence,
        )
        return self.replace(
            scores=scores, cells=cells, extra_scores={**self.extra_scores, EVIDENCE: merged}
        )


def _contest(
    tessellation: Tessellation,
    cells: Int[Array, "tasks cells"],
    pool: Belief,
    scores: Float[Array, "batch tasks"],
    batch: Belief,
) -> tuple[Int[Array, "tasks batch"], Float[Array, "tasks batch"]]:
    """Who holds each row's cell in each archive, and how likely the row is better; 1 if nobody."""

    def one(k: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
        holder = table[tessellation.cell_of(scores, k)]
        row = Belief(*(jnp.take(x, k, axis=1) for x in batch))
        rival = Belief(*(jnp.take(x, k, axis=1)[jnp.maximum(holder, 0)] for x in pool))
        return holder, jnp.where(holder == EMPTY, 1.0, probability_better(row, rival))

    return jax.vmap(one)(jnp.arange(tessellation.num_tasks, dtype=jnp.int32), cells)


@jax.jit
def _decide_by_test(
    tessellation: Tessellation,
    pool_scores: Float[Array, "capacity tasks"],
    cells: Int[Array, "tasks cells"],
    pool: Evidence,
    scores: Float[Array, "batch tasks"],
    batch: Evidence,
    noise: NoiseModel,
    confidence: Float[Array, ""],
) -> Decision:
    _, better = _contest(tessellation, cells, noise(pool), scores, noise(batch))
    return decide(tessellation, pool_scores, cells, scores, better >= confidence)


@partial(jax.jit, static_argnames="limit")
def _challenged(
    tessellation: Tessellation,
    cells: Int[Array, "tasks cells"],
    pool: Evidence,
    batch: Evidence,
    noise: NoiseModel,
    confidence: Float[Array, ""],
    *,
    limit: int,
) -> Int[Array, " limit"]:
    capacity = pool.count.shape[0]
    holder, better = _contest(tessellation, cells, noise(pool), batch.scores, noise(batch))
    calls = (holder != EMPTY) & (better >= 1 - confidence) & (batch.count > 0)
    target = jnp.where(calls, holder, capacity)
    doubt = jnp.zeros(capacity, jnp.float32).at[target].max(better, mode="drop")
    value, index = jax.lax.top_k(doubt, min(limit, capacity))
    found = jnp.where(value > 0, index, EMPTY).astype(jnp.int32)
    return jnp.pad(found, (0, limit - found.shape[0]), constant_values=EMPTY)


@jax.jit
def _reassess(
    tessellation: Tessellation,
    cells: Int[Array, "tasks cells"],
    pool: Evidence,
    indices: Int[Array, " again"],
    again: Evidence,
    noise: NoiseModel,
    confidence: Float[Array, ""],
) -> tuple[Evidence, Float[Array, "capacity tasks"], Int[Array, "tasks cells"]]:
    """The pool's new evidence, scores and table of cells."""
    capacity = pool.count.shape[0]
    occupied = occupied_slots(cells, capacity)
    slot = jnp.where((indices != EMPTY) & occupied[indices], indices, capacity)
    merged = jax.tree.map(lambda x: x[indices], pool).merge(again)
    evidence = jax.tree.map(lambda x, new: x.at[slot].set(new, mode="drop"), pool, merged)
    scores = jnp.where(occupied[:, None], evidence.scores, -jnp.inf)
    belief = noise(evidence)

    tasks = jnp.arange(tessellation.num_tasks, dtype=jnp.int32)
    own_cell = jax.vmap(lambda k: tessellation.cell_of(scores, k))(tasks)
    here = jnp.arange(cells.shape[1], dtype=jnp.int32)
    at_home = jnp.take_along_axis(own_cell, jnp.maximum(cells, 0), axis=1) == here
    staying = jnp.where(at_home, cells, EMPTY)

    _, better = _contest(tessellation, staying, belief, scores, belief)
    entrant = decide(tessellation, scores, staying, scores, better >= confidence).entrant
    filed = jnp.where(entrant != EMPTY, entrant, staying)
    kept = occupied_slots(filed, capacity)
    return evidence, jnp.where(kept[:, None], scores, -jnp.inf), filed


def _with_evidence(extra_scores: Mapping[str, Any] | None, fitnesses: Any) -> dict[str, Any]:
    extra = dict(extra_scores or {})
    if EVIDENCE not in extra:
        extra[EVIDENCE] = Evidence.of(jnp.asarray(fitnesses)[None])
        return extra
    evidence = extra[EVIDENCE]
    if not isinstance(evidence, Evidence):
        raise ValueError(
            f"extra score '{EVIDENCE}': expected an Evidence (see Evidence.of), found "
            f"{type(evidence).__name__}"
        )
    if not (is_traced(evidence.count) or is_traced(fitnesses)) and not np.array_equal(
        np.asarray(evidence.scores), np.asarray(fitnesses, np.float32), equal_nan=True
    ):
        raise ValueError(
            "fitnesses: expected the means of the evidence, evidence.scores, found other scores"
        )
    return extra


def _check_noise(noise: NoiseModel, evidence: Evidence) -> None:
    expected = evidence.mean.shape
    try:
        shapes = [x.shape for x in jax.eval_shape(lambda n, e: n(e), noise, evidence)]
    except (TypeError, ValueError) as error:  # shapes that do not broadcast
        raise ValueError(f"noise: expected a model of {expected[1]} tasks: {error}") from error
    if shapes != [expected] * 3:
        raise ValueError(
            f"noise: expected a Belief of three arrays of shape {expected} (genotypes, tasks), "
            f"found {shapes}"
        )


def _check_tasks(evidence: Evidence, tasks: int) -> None:
    if evidence.mean.shape[1] != tasks:
        raise ValueError(f"evidence: expected {tasks} tasks, found {evidence.mean.shape[1]}")


def _check_indices(indices: np.ndarray, occupied: np.ndarray) -> None:
    given = indices[indices != EMPTY]
    for index in given.tolist():
        if not 0 <= index < occupied.size or not occupied[index]:
            raise ValueError(
                f"indices: expected pool indices of elites, found {index}, where none is stored: "
                "reassess before the repertoire changes"
            )
    if np.unique(given).size < given.size:
        raise ValueError(f"indices: expected every elite once, found {given.tolist()}")
