"""MAP-Elites that spends part of its evaluations on incumbents: adaptive sampling."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from qdax.core.map_elites import MAPElites

from cycleqd_jax.qd.evidence import Evidence
from cycleqd_jax.qd.noise import EVIDENCE, NoisyRepertoire


class AdaptiveMAPElites(MAPElites):
    """QDax's ``MAPElites`` that evaluates challenged incumbents again (Justesen et al., 2019).

    `update` and `scan_update` need a jittable scoring function and cost ``batch * evaluations +
    reevaluations`` evaluations, also where fewer incumbents are challenged. `ask` and `tell` are
    QDax's: there the caller evaluates, and calls ``NoisyRepertoire.challenged`` and ``reassess``
    in between.
    """

    def __init__(
        self,
        scoring_function: Callable[[Any, jax.Array], tuple[Any, Any, Mapping[str, Any]]],
        emitter: Any,
        metrics_function: Callable[[Any], Any],
        repertoire_init: Callable[..., NoisyRepertoire],
        *,
        reevaluations: int,
        evaluations: int = 1,
    ) -> None:
        """Set up the loop.

        Args:
            scoring_function: ``(genotypes, key) -> (scores (B, K), the same, extra scores)``; two
                keys draw two independent evaluations. Extra scores are the first evaluation's.
            emitter: a QDax emitter.
            metrics_function: metrics of a repertoire.
            repertoire_init: ``partial(NoisyRepertoire.init, noise=..., ...)``.
            reevaluations: incumbents at most that are evaluated again, once each a generation.
            evaluations: evaluations of every child.

        Raises:
            ValueError: either number is below 1.
        """
        for name, value in (("reevaluations", reevaluations), ("evaluations", evaluations)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
        super().__init__(self._evaluate, emitter, metrics_function, repertoire_init)
        self._draw = scoring_function
        self._evaluations = evaluations
        self._reevaluations = reevaluations

    def _evaluate(self, genotypes: Any, key: jax.Array) -> tuple[Any, Any, dict[str, Any]]:
        keys = jax.random.split(key, self._evaluations)
        samples, _, extra = jax.vmap(self._draw, in_axes=(None, 0))(genotypes, keys)
        evidence = Evidence.of(samples)
        first = jax.tree.map(lambda x: x[0], dict(extra))
        return evidence.scores, evidence.scores, {**first, EVIDENCE: evidence}

    def update(self, repertoire: Any, emitter_state: Any, key: jax.Array) -> tuple[Any, Any, Any]:
        """One generation: breed, evaluate, evaluate the challenged again, add.

        For the same key and repertoire the children are those of QDax's ``update``.

        Args:
            repertoire: a `NoisyRepertoire`.
            emitter_state: the emitter's state.
            key: random key.

        Returns:
            The new repertoire, emitter state and metrics.
        """
        key, ask_key = jax.random.split(key)
        children, info = self.ask(repertoire, emitter_state, ask_key)
        again_key, score_key = jax.random.split(key)
        scores, _, extra = self._evaluate(children, score_key)
        indices = repertoire.challenged(extra[EVIDENCE], self._reevaluations)
        incumbents = repertoire.gather(jnp.maximum(indices, 0))
        again, _, _ = self._draw(incumbents, again_key)
        repertoire = repertoire.reassess(indices, Evidence.of(again[None]))
        return self.tell(
            genotypes=children,
            fitnesses=scores,
            descriptors=scores,
            repertoire=repertoire,
            emitter_state=emitter_state,
            extra_scores=extra,
            extra_info=info,
        )
