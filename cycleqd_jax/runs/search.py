"""The search itself: QDax's MAP-Elites, asked and told, with logs and checkpoints around it."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qdax.core.map_elites import MAPElites

from cycleqd_jax.merging.spectral import expert_gains, gain_layout
from cycleqd_jax.progress import Progress
from cycleqd_jax.qd.metrics import acceptance, qd_metrics
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.runs.checkpoint import Checkpoints
from cycleqd_jax.runs.evaluate import Evaluator
from cycleqd_jax.runs.folder import RunFolder
from cycleqd_jax.runs.jsonl import JsonlWriter, truncate_after
from cycleqd_jax.runs.lineage import Birth
from cycleqd_jax.runs.monitor import Monitor, device_memory, progress_note
from cycleqd_jax.runs.workspace import Workspace
from cycleqd_jax.tasks.rollout import Rollout


class Search:
    """The state of one search and the loop that moves it on.

    Args:
        workspace: the checked inputs.
        evaluator: scores populations.
        folder: where logs and checkpoints go; a folder with checkpoints is resumed.
        monitor: shows every generation, and may end the search after one.

    ``repertoire`` and ``expert_scores`` are there after `run`.
    """

    def __init__(
        self, workspace: Workspace, evaluator: Evaluator, folder: RunFolder, monitor: Monitor
    ) -> None:
        self._workspace = workspace
        self._monitor = monitor
        self._evaluator = evaluator
        self._folder = folder
        self._config = workspace.config
        self._problems = workspace.problems("search", self._config.problems, self._config.seed)
        self._key = jax.random.key(self._config.seed)
        self.repertoire: CyclicRepertoire
        self.expert_scores: Mapping[str, list[float]] = {}

    @property
    def evaluations(self) -> int:
        """Models evaluated: the experts and every child."""
        return len(self._config.experts) + self._config.generations * self._config.children

    def metrics(self) -> dict[str, Any]:
        """QD metrics of the repertoire as it is."""
        return qd_metrics(self.repertoire)

    def run(self) -> None:
        """Breed every generation that is not in a checkpoint yet.

        Raises:
            KeyboardInterrupt: the monitor was asked to stop; all that was bred is in a checkpoint.
        """
        checkpoints = Checkpoints(self._folder.checkpoints)
        experts = self._experts()
        scores = self._score_experts(experts)
        search = self._algorithm(scores)
        self.repertoire, state, _ = search.init_ask_tell(
            genotypes=experts,
            fitnesses=jnp.asarray(scores),
            descriptors=jnp.asarray(scores),
            centroids=self._config.preset.build_grid(scores),
            key=self._key,
            extra_scores={"id": jnp.arange(len(scores), dtype=jnp.int32)},
        )
        done = 0
        restored = checkpoints.restore({"repertoire": self.repertoire, "emitter": state})
        if restored is not None:
            done = restored.generation
            self.repertoire, state = restored.state["repertoire"], restored.state["emitter"]
        for path in (self._folder.metrics_file, self._folder.lineage_file):
            truncate_after(path, done if restored is not None else -1)
        with (
            JsonlWriter(self._folder.metrics_file) as metrics,
            JsonlWriter(self._folder.lineage_file) as lineage,
            Progress("evolve", self._config.generations) as progress,
            self._monitor.watching(done, self._config.generations),
        ):
            if restored is None:
                self._log_experts(lineage)
            progress.advance(done)
            for generation in range(done + 1, self._config.generations + 1):
                state, row = self._generation(search, state, generation, lineage)
                metrics.write(row)
                progress.advance(note=progress_note(row, self._config.tasks))
                stop = self._monitor.step(row, self.repertoire, self.expert_scores)
                last = generation == self._config.generations
                if stop or last or generation % self._config.checkpoint_every == 0:
                    for log in (metrics, lineage):
                        log.sync()
                    checkpoints.save(
                        generation, {"repertoire": self.repertoire, "emitter": state}, {}
                    )
                if stop and not last:
                    raise KeyboardInterrupt

    def _experts(self) -> Any:
        number = jnp.arange(len(self._config.experts), dtype=jnp.int32)
        return jax.vmap(partial(expert_gains, gain_layout(self._workspace.basis)))(number)

    def _score_experts(self, experts: Any) -> np.ndarray:
        with Progress("experts", len(self._config.experts)) as progress:
            scores = self._evaluator.population(
                experts,
                self._problems,
                lambda done: progress.advance(done - progress.completed),
                phase="experts",
            ).scores
        self.expert_scores = {
            name: [float(score) for score in row]
            for name, row in zip(self._config.experts, scores, strict=True)
        }
        return scores

    def _algorithm(self, expert_scores: np.ndarray) -> MAPElites:
        config, layout = self._config, gain_layout(self._workspace.basis)
        emitter = config.preset.build_emitter(
            layout,
            config.children,
            len(config.tasks),
            expert_of_archive=experts_of_tasks(
                list(config.experts), list(config.tasks), expert_scores
            ),
        )
        return MAPElites(
            scoring_function=None,
            emitter=emitter,
            metrics_function=qd_metrics,
            repertoire_init=partial(CyclicRepertoire.init, keys_extra_scores=("id",)),
        )

    def _generation(
        self, search: MAPElites, state: Any, generation: int, lineage: JsonlWriter
    ) -> tuple[Any, dict[str, Any]]:
        """Breed, score and offer one batch; log every child; return the state and a metrics row."""
        started = time.perf_counter()
        # A key per generation rather than a chain of them: a resumed run needs no stored key.
        children, info = search.ask(
            self.repertoire, state, jax.random.fold_in(self._key, generation)
        )
        parents = np.asarray(self.repertoire.extra_scores["id"])[np.asarray(info["parents"])]
        emitted = time.perf_counter()
        tokens = self._evaluator.decoder.stats.generated_tokens
        phase = f"generation-{generation:06d}"
        played = self._evaluator.population(children, self._problems, phase=phase)
        tokens = self._evaluator.decoder.stats.generated_tokens - tokens
        scored = time.perf_counter()
        count = self._config.children
        first = len(self._config.experts) + (generation - 1) * count
        ids = np.arange(first, first + count, dtype=np.int32)
        scores = jnp.asarray(played.scores)
        self.repertoire, state, metrics = search.tell(
            genotypes=children,
            fitnesses=scores,
            descriptors=scores,
            repertoire=self.repertoire,
            emitter_state=state,
            extra_scores={"id": jnp.asarray(ids)},
            extra_info=info,
        )
        archives = np.asarray(info["archive"])
        for child in range(count):
            lineage.write(
                self._birth(
                    int(ids[child]),
                    tuple(int(parent) for parent in parents[child]),
                    int(archives[child]),
                    generation,
                    played.scores[child],
                ).to_row()
            )
        entered = acceptance(
            self.repertoire, jnp.asarray(ids), info["archive"], len(self._config.tasks)
        )
        row = self._row(generation, metrics, played, tokens)
        row["archive"] = sorted({int(archive) for archive in archives})
        # One number for the archive a child was bred in; an archive without children has 0 of 0.
        row["offered"] = np.asarray(entered.offered).tolist()
        row["accepted"] = np.asarray(entered.accepted).tolist()
        row["seconds"] = {
            "emit": emitted - started,
            **played.seconds,
            "add": time.perf_counter() - scored,
        }
        return state, row

    def _row(
        self, generation: int, metrics: Mapping[str, Any], played: Rollout, tokens: int
    ) -> dict[str, Any]:
        means = np.asarray(self.repertoire.scores).mean(axis=1)
        return {
            "generation": generation,
            "evaluations": len(self._config.experts) + generation * self._config.children,
            **{
                name: [float(value) for value in np.asarray(metrics[name])]
                for name in ("coverage", "qd_score", "best")
            },
            "best_mean": float(means[np.asarray(self.repertoire.occupied)].max()),
            "elites": int(metrics["num_elites"]),
            "tokens": tokens,
            "tokens_per_second": tokens / max(played.seconds["model"], 1e-9),
            **({"device_memory": memory} if (memory := device_memory()) else {}),
        }

    def _log_experts(self, lineage: JsonlWriter) -> None:
        for number, (name, scores) in enumerate(self.expert_scores.items()):
            birth = self._birth(number, (), None, 0, np.asarray(scores))
            lineage.write({**birth.to_row(), "operator": {"expert": name}})

    def _birth(
        self,
        number: int,
        parents: tuple[int, ...],
        archive: int | None,
        generation: int,
        scores: np.ndarray,
    ) -> Birth:
        named = dict(zip(self._config.tasks, map(float, scores), strict=True))
        return Birth(
            id=number, parents=parents, archive=archive, generation=generation, scores=named
        )


def experts_of_tasks(experts: list[str], tasks: list[str], scores: np.ndarray) -> tuple[int, ...]:
    """Return the expert whose directions serve each archive.

    The one of the task's name, or else the one that scores best on the task (the first on a tie).
    """
    return tuple(
        experts.index(task) if task in experts else int(np.argmax(scores[:, k]))
        for k, task in enumerate(tasks)
    )
