"""Scores of models and of whole populations: attach the gains, play the problems."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.models.cache import unstack_layers
from cycleqd_jax.models.generate import Decoder
from cycleqd_jax.models.kernels import attach
from cycleqd_jax.runs.policy import PopulationPolicy
from cycleqd_jax.runs.workspace import Workspace
from cycleqd_jax.sandbox.base import Sandbox
from cycleqd_jax.tasks.base import Problem
from cycleqd_jax.tasks.rollout import Rollout, rollout

Problems = Mapping[str, Sequence[Problem]]


class Evaluator:
    """Plays problems with candidates given as gains, or with one model given as weights.

    Args:
        workspace: models, basis, tasks.
        sandbox: where the models' programs run.

    A population of any size is cut into parts of ``config.children`` candidates, the last one
    filled up with the base model, so that everything is compiled for one size.
    """

    def __init__(self, workspace: Workspace, sandbox: Sandbox) -> None:
        self._workspace = workspace
        self._sandbox = sandbox
        tokenizer = workspace.tokenizer
        stops = workspace.architecture.eos_ids or (tokenizer.eos_token_id,)
        self.decoder = Decoder(
            None,
            workspace.architecture,
            stop_tokens=stops,
            pad_token=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
            max_new_tokens=workspace.config.max_new_tokens,
        )
        self._policy = PopulationPolicy(self.decoder, tokenizer)
        # Layers apart, as decoding wants them, once: or else every turn of the agents would slice
        # and copy all weights anew.
        self._base = unstack_layers(workspace.base)
        self._basis = unstack_layers(workspace.basis)
        self._attach = jax.jit(_attach_layers)

    def population(
        self, gains: Any, problems: Problems, on_progress: Callable[[int], None] = lambda done: None
    ) -> Rollout:
        """Play the problems with every candidate.

        Args:
            gains: tree with leaves (candidates, ...).
            problems: task name → problems.
            on_progress: called with the number of candidates that are done.
        """
        count = jax.tree.leaves(gains)[0].shape[0]
        size = self._workspace.config.children
        parts = []
        for start in range(0, count, size):
            stop = min(start + size, count)
            part = jax.tree.map(lambda leaf, a=start, b=stop: _fill(leaf[a:b], size), gains)
            attached = self._attach(self._base, self._basis, part)
            self._policy.use(attached, population=True)
            parts.append(self._play(stop - start, problems))
            on_progress(stop)
        return _join(parts)

    def model(self, params: Any, problems: Problems) -> Rollout:
        """Play the problems with one model, given as weights."""
        self._policy.use(unstack_layers(params), population=False)
        return self._play(1, problems)

    def _play(self, candidates: int, problems: Problems) -> Rollout:
        return rollout(self._workspace.tasks, problems, candidates, self._policy, self._sandbox)


def _attach_layers(base: Any, basis: Any, gains: Any) -> Any:
    """`attach` where the layers of base and basis are apart already."""
    layer_first = jax.tree.map(lambda g: jnp.moveaxis(g, 1, 0), gains.layers)
    return attach(base, basis, unstack_layers(gains.replace(layers=layer_first)))


def _fill(leaf: Any, size: int) -> Any:
    missing = size - leaf.shape[0]
    return jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) if missing else leaf


def _join(parts: Sequence[Rollout]) -> Rollout:
    return Rollout(
        solved={
            name: np.concatenate([part.solved[name] for part in parts]) for name in parts[0].solved
        },
        seconds={phase: sum(part.seconds[phase] for part in parts) for phase in parts[0].seconds},
        requests=sum(part.requests for part in parts),
    )
