"""Scores of models and of whole populations: attach the gains, play the problems."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.models.generate import Decoder
from cycleqd_jax.models.sampling import Sampling
from cycleqd_jax.runs.hosts.division import Chosen, Costs, Division, Problems
from cycleqd_jax.runs.hosts.processes import ALONE, Hosts
from cycleqd_jax.runs.policy import PopulationPolicy
from cycleqd_jax.runs.rebuild import digests
from cycleqd_jax.runs.records.transcripts import record_transcripts
from cycleqd_jax.runs.workspace import Workspace
from cycleqd_jax.sandbox.base import Sandbox
from cycleqd_jax.sharding import batch_placement
from cycleqd_jax.tasks.played import Rollout, beside
from cycleqd_jax.tasks.rollout import TimeLimits, rollout
from cycleqd_jax.tasks.transcript import Transcript

OnEpisode = Callable[[Transcript], None]


class Evaluator:
    """Plays problems with candidates given as gains, or with one model given as weights.

    Args:
        workspace: models, basis, tasks.
        sandbox: where the models' programs run.
        transcripts: folder for the transcripts of all episodes, written by process 0; None keeps
            none.
        hosts: share the episodes; all are to be asked for the same in the same order.

    A population of any size is cut into parts of ``config.children`` candidates, the last one
    filled up with the base model, so that everything is compiled for one size.

    Attributes:
        generated_tokens: by all hosts in all rollouts.
    """

    def __init__(
        self,
        workspace: Workspace,
        sandbox: Sandbox,
        transcripts: Path | None = None,
        hosts: Hosts = ALONE,
    ) -> None:
        self._workspace = workspace
        self._sandbox = sandbox
        self._transcripts = transcripts
        self._hosts = hosts
        self._costs = Costs()
        self.generated_tokens = 0
        tokenizer, mesh = workspace.tokenizer, workspace.mesh
        stops = workspace.architecture.eos_ids or (tokenizer.eos_token_id,)
        self.decoder = Decoder(
            None,
            workspace.architecture,
            stop_tokens=stops,
            pad_token=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
            max_new_tokens=workspace.config.max_new_tokens,
            placement=None if mesh is None else batch_placement(workspace.architecture, mesh),
        )
        sampling = Sampling(temperature=workspace.config.temperature)
        self._policy = PopulationPolicy(self.decoder, tokenizer, sampling)

    def population(
        self,
        gains: Any,
        problems: Problems,
        on_progress: Callable[[int], None] = lambda done: None,
        *,
        phase: str = "population",
        chosen: Chosen | None = None,
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

        def play(chosen: Chosen | None, on_episode: OnEpisode | None) -> Rollout:
            parts = []
            for start in range(0, count, size):
                stop = min(start + size, count)
                part = jax.tree.map(lambda leaf, a=start, b=stop: _fill(leaf[a:b], size), gains)
                played = None if chosen is None else _rows(chosen, start, stop)
                with self._policy.using(self._workspace.population(part), population=True):
                    parts.append(
                        self._play(stop - start, problems, phase, start, on_episode, played)
                    )
                on_progress(stop)
            return beside(parts)

        marks = [] if self._hosts.count == 1 else digests(gains)
        return self._together(play, problems, count, phase, chosen, marks, more)

    def model(self, params: Any, problems: Problems, *, phase: str = "model") -> Rollout:
        """Play the problems with one model, given as weights; ``phase`` as in `population`."""

        def play(chosen: Chosen | None, on_episode: OnEpisode | None) -> Rollout:
            with self._policy.using(params, population=False):
                return self._play(1, problems, phase, 0, on_episode, chosen)

        return self._together(play, problems, 1, phase, None, [phase])

    def _together(
        self,
        play: Callable[[Chosen | None, OnEpisode | None], Rollout],
        problems: Problems,
        candidates: int,
        phase: str,
        chosen: Chosen | None,
        marks: Sequence[str],
        more: bool = False,
    ) -> Rollout:
        """Play this host's part, and return what all hosts played."""
        before = self.decoder.stats.generated_tokens
        with self._record(phase, more) as write:
            if self._hosts.count == 1:
                played = play(chosen, write)
                tokens = self.decoder.stats.generated_tokens - before
            else:
                division = Division(
                    self._hosts,
                    self._costs,
                    problems,
                    candidates,
                    chosen,
                    marks,
                    transcripts=self._transcripts is not None,
                )
                part = play(division.mine, _both(division.take, write))
                tokens = self.decoder.stats.generated_tokens - before
                played, tokens = division.join(part, tokens, write)
        self.generated_tokens += tokens
        return played

    def _record(self, phase: str, more: bool) -> AbstractContextManager[OnEpisode | None]:
        if self._transcripts is None or not self._hosts.first:
            return nullcontext()
        return record_transcripts(self._transcripts, phase, more=more)

    def _play(
        self,
        candidates: int,
        problems: Problems,
        phase: str,
        first: int,
        on_episode: OnEpisode | None,
        chosen: Chosen | None = None,
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


def _fill(leaf: Any, size: int) -> Any:
    missing = size - leaf.shape[0]
    return jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) if missing else leaf


def _rows(chosen: Chosen, start: int, stop: int) -> dict[str, np.ndarray]:
    return {name: rows[start:stop] for name, rows in chosen.items()}


def _both(first: OnEpisode, second: OnEpisode | None) -> OnEpisode:
    def take(transcript: Transcript) -> None:
        first(transcript)
        if second is not None:
            second(transcript)

    return take
