"""Scores of models and of whole populations: attach the gains, play the problems."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.models.cache import unstack_layers
from cycleqd_jax.models.generate import Decoder
from cycleqd_jax.models.kernels import attach
from cycleqd_jax.models.sampling import Sampling
from cycleqd_jax.runs.policy import PopulationPolicy
from cycleqd_jax.runs.transcripts import record_transcripts
from cycleqd_jax.runs.workspace import Workspace
from cycleqd_jax.sandbox.base import Sandbox
from cycleqd_jax.tasks.base import Problem
from cycleqd_jax.tasks.played import Rollout, beside
from cycleqd_jax.tasks.rollout import TimeLimits, rollout
from cycleqd_jax.tasks.transcript import Transcript

Problems = Mapping[str, Sequence[Problem]]


class Evaluator:
    """Plays problems with candidates given as gains, or with one model given as weights.

    Args:
        workspace: models, basis, tasks.
        sandbox: where the models' programs run.
        transcripts: folder for the transcripts of all episodes; None writes none.

    A population of any size is cut into parts of ``config.children`` candidates, the last one
    filled up with the base model, so that everything is compiled for one size.
    """

    def __init__(
        self, workspace: Workspace, sandbox: Sandbox, transcripts: Path | None = None
    ) -> None:
        self._workspace = workspace
        self._sandbox = sandbox
        self._transcripts = transcripts
        tokenizer = workspace.tokenizer
        stops = workspace.architecture.eos_ids or (tokenizer.eos_token_id,)
        self.decoder = Decoder(
            None,
            workspace.architecture,
            stop_tokens=stops,
            pad_token=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
            max_new_tokens=workspace.config.max_new_tokens,
        )
        sampling = Sampling(temperature=workspace.config.temperature)
        self._policy = PopulationPolicy(self.decoder, tokenizer, sampling)
        # Layers apart, as decoding wants them, once: or else every turn of the agents would slice
        # and copy all weights anew.
        self._base = unstack_layers(workspace.base)
        self._basis = unstack_layers(workspace.basis)
        self._attach = jax.jit(_attach_layers)

    def population(
        self,
        gains: Any,
        problems: Problems,
        on_progress: Callable[[int], None] = lambda done: None,
        *,
        phase: str = "population",
        chosen: Mapping[str, np.ndarray] | None = None,
        more: bool = False,
    ) -> Rollout:
        """Play the problems with every candidate, or those that are chosen.

        Args:
            gains: tree with leaves (candidates, ...).
            problems: task name → problems.
            on_progress: called with the number of candidates that are done.
            phase: names the rollout within the run: its seeds and its transcripts.
            chosen: as of `rollout`.
            more: a part of this phase was played before: its transcripts stay.
        """
        count = jax.tree.leaves(gains)[0].shape[0]
        size = self._workspace.config.children
        parts = []
        with self._record(phase, more) as on_episode:
            for start in range(0, count, size):
                stop = min(start + size, count)
                part = jax.tree.map(lambda leaf, a=start, b=stop: _fill(leaf[a:b], size), gains)
                attached = self._attach(self._base, self._basis, part)
                self._policy.use(attached, population=True)
                played = None if chosen is None else _rows(chosen, start, stop)
                parts.append(self._play(stop - start, problems, phase, start, on_episode, played))
                on_progress(stop)
        return beside(parts)

    def model(self, params: Any, problems: Problems, *, phase: str = "model") -> Rollout:
        """Play the problems with one model, given as weights; ``phase`` as in `population`."""
        self._policy.use(unstack_layers(params), population=False)
        with self._record(phase) as on_episode:
            return self._play(1, problems, phase, 0, on_episode)

    def _record(
        self, phase: str, more: bool = False
    ) -> AbstractContextManager[Callable[[Transcript], None] | None]:
        if self._transcripts is None:
            return nullcontext()
        return record_transcripts(self._transcripts, phase, more=more)

    def _play(
        self,
        candidates: int,
        problems: Problems,
        phase: str,
        first: int,
        on_episode: Callable[[Transcript], None] | None,
        chosen: Mapping[str, np.ndarray] | None = None,
    ) -> Rollout:
        config = self._workspace.config
        return rollout(
            self._workspace.tasks,
            problems,
            candidates,
            self._policy,
            self._sandbox,
            repeats=config.repeats,
            seed=f"{config.seed}/{phase}",
            first_candidate=first,
            limits=TimeLimits(step=config.step_seconds, episode=config.episode_seconds),
            on_episode=on_episode,
            chosen=chosen,
        )


def _attach_layers(base: Any, basis: Any, gains: Any) -> Any:
    """`attach` where the layers of base and basis are apart already."""
    layer_first = jax.tree.map(lambda g: jnp.moveaxis(g, 1, 0), gains.layers)
    return attach(base, basis, unstack_layers(gains.replace(layers=layer_first)))


def _fill(leaf: Any, size: int) -> Any:
    missing = size - leaf.shape[0]
    return jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) if missing else leaf


def _rows(chosen: Mapping[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
    return {name: rows[start:stop] for name, rows in chosen.items()}
