"""The search itself: QDax's MAP-Elites, asked and told, with logs and checkpoints around it."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qdax.core.map_elites import MAPElites

from cycleqd_jax.progress import Progress
from cycleqd_jax.qd.compact import compact, expand
from cycleqd_jax.qd.metrics import acceptance, qd_metrics
from cycleqd_jax.qd.repertoire import CyclicRepertoire
from cycleqd_jax.runs.breeding import first_parents, make_emitter
from cycleqd_jax.runs.evaluate import Evaluator
from cycleqd_jax.runs.failures import Failures
from cycleqd_jax.runs.fitness import Fitness, Scored, problems_of, results_of
from cycleqd_jax.runs.hosts.processes import ALONE, Hosts, Stopped
from cycleqd_jax.runs.rebuild import digests
from cycleqd_jax.runs.records.checkpoint import Checkpoints, Restored
from cycleqd_jax.runs.records.folder import RunFolder
from cycleqd_jax.runs.records.jsonl import JsonlWriter, Log, NoLog, truncate_after
from cycleqd_jax.runs.records.leaves import named_leaves, rebuild, to_numpy
from cycleqd_jax.runs.records.lineage import Birth, LineageError, read_births
from cycleqd_jax.runs.watching.monitor import Monitor, device_memory, progress_note
from cycleqd_jax.runs.workspace import Workspace
from cycleqd_jax.tasks.played import Rollout


class Search:
    """The state of one search and the loop that moves it on.

    Args:
        workspace: the checked inputs.
        evaluator: scores populations.
        folder: where logs and checkpoints go; a folder with checkpoints is resumed. None on all
            hosts but the first: they breed the same and write nothing.
        monitor: shows every generation, and may end the search after one.
        hosts: of the run.

    ``repertoire`` and ``expert_scores`` are there after `run`.
    """

    def __init__(
        self,
        workspace: Workspace,
        evaluator: Evaluator,
        folder: RunFolder | None,
        monitor: Monitor,
        hosts: Hosts = ALONE,
    ) -> None:
        self._workspace = workspace
        self._monitor = monitor
        self._evaluator = evaluator
        self._folder = folder
        self._hosts = hosts
        self._config = workspace.config
        self._problems = workspace.problems("search", self._config.problems, self._config.seed)
        self._fitness = Fitness(self._config, evaluator, self._problems)
        self._key = jax.random.key(self._config.seed)
        self._draw = jax.jit(jax.vmap(self._config.preset.crossover_draw))
        self.repertoire: CyclicRepertoire
        self.expert_scores: Mapping[str, list[float]] = {}

    @property
    def evaluations(self) -> int:
        """Models evaluated: the experts and every child."""
        return self._evaluations(self._config.generations)

    def metrics(self) -> dict[str, Any]:
        """QD metrics of the repertoire as it is."""
        return qd_metrics(self.repertoire)

    def run(self) -> None:
        """Breed every generation that is not in a checkpoint yet.

        Raises:
            GenerationFailed: none of the experts or of a generation's children could be scored.
            CheckpointError: no checkpoint can be read, or it is of another structure.
            LineageError: the log lacks what the checkpoint rests on.
            NoSpaceError: the disk is full.
            Stopped: a monitor was asked to stop; all that was bred is in a checkpoint.
        """
        config = self._config
        if self._folder is None:
            self._run(None)
            return
        with Checkpoints(
            self._folder.checkpoints, config.checkpoints_kept, config.checkpoint_archive
        ) as checkpoints:
            self._run(checkpoints)

    def _run(self, checkpoints: Checkpoints | None) -> None:
        config = self._config
        experts = first_parents(self._workspace)
        found = checkpoints is not None and checkpoints.latest() is not None
        resuming = self._hosts.broadcast(found)
        if resuming:
            scores = first = self._logged_scores()
            # A template: what the elites made of each problem is in the checkpoint.
            solved = np.zeros((*scores.shape, config.problems), np.float32)
        else:
            played = self._play_experts(experts)
            solved = results_of(played, config.tasks)
            scores, first = self._name_scores(played.scores), self._fitness.begin(solved)
        kept = self._fitness.kept(solved)
        self._emitter = make_emitter(self._workspace, scores)
        search = MAPElites(
            scoring_function=None,
            emitter=self._emitter,
            metrics_function=qd_metrics,
            repertoire_init=partial(CyclicRepertoire.init, keys_extra_scores=("id", *kept)),
        )
        self.repertoire, state, _ = search.init_ask_tell(
            genotypes=experts,
            fitnesses=jnp.asarray(first),
            descriptors=jnp.asarray(first),
            centroids=config.preset.build_grid(scores),
            key=self._key,
            extra_scores={"id": jnp.arange(len(scores), dtype=jnp.int32), **kept},
        )
        done = 0
        failures = Failures()
        if resuming:
            template = {"repertoire": compact(self.repertoire), "emitter": state}
            restored = self._restore(checkpoints, template)
            done, failures = restored.generation, Failures(**restored.counters["failures"])
            self._fitness.resume(restored.counters["orders"])
            self.repertoire = expand(restored.state["repertoire"])
            state = restored.state["emitter"]
        metrics_log, lineage_log = self._logs(done if resuming else -1)
        with (
            metrics_log as metrics,
            lineage_log as lineage,
            Progress("evolve", config.generations) as progress,
            self._monitor.watching(done, config.generations),
        ):
            if not resuming:
                self._log_experts(lineage, experts)
            progress.advance(done)
            self._hosts.waiting()  # what was before is of no generation
            for generation in range(done + 1, config.generations + 1):
                state, row, failed = self._generation(search, state, generation, lineage)
                failures += failed
                metrics.write(row)
                note = progress_note(row, config.tasks)
                progress.advance(note=f"{note}  {failures}" if failures else note)
                asked = self._monitor.step(row, self.repertoire, self.expert_scores)
                stop = any(self._hosts.gather(asked, "whether to stop"))
                last = generation == config.generations
                due = stop or last or generation % config.checkpoint_every == 0
                if due and checkpoints is not None:
                    for log in (metrics, lineage):
                        log.sync()
                    checkpoints.save(
                        generation,
                        {"repertoire": compact(self.repertoire), "emitter": state},
                        {
                            "evaluations": self._evaluations(generation),
                            "failures": failures.to_json(),
                            "orders": self._fitness.orders,
                        },
                    )
                if stop:
                    raise Stopped

    def _logs(self, last: int) -> tuple[Log, Log]:
        """The logs of metrics and lineage, without what was written after generation ``last``."""
        if self._folder is None:
            return NoLog(), NoLog()
        paths = self._folder.metrics_file, self._folder.lineage_file
        for path in paths:
            truncate_after(path, last)
        metrics, lineage = map(JsonlWriter, paths)
        return metrics, lineage

    def _restore(self, checkpoints: Checkpoints | None, template: Any) -> Restored:
        """The newest checkpoint, which process 0 reads, on all hosts."""
        read = None if checkpoints is None else checkpoints.restore(template)
        if self._hosts.count == 1:
            assert read is not None
            return read
        sent = read and {
            "generation": read.generation,
            "counters": read.counters,
            "leaves": [to_numpy(leaf, name) for name, leaf in named_leaves(read.state)],
        }
        found = self._hosts.broadcast(sent)
        state = rebuild(template, found["leaves"])
        return Restored(found["generation"], state, found["counters"])

    def _evaluations(self, generation: int) -> int:
        return len(self._config.experts) + generation * self._config.children

    def _play_experts(self, experts: Any) -> Rollout:
        with Progress("experts", len(self._config.experts)) as progress:
            played = self._evaluator.population(
                experts,
                self._problems,
                lambda done: progress.advance(done - progress.completed),
                phase="experts",
            )
        Failures.of(played).refuse_blindness("the experts", played)
        return played

    def _logged_scores(self) -> np.ndarray:
        """The experts' scores that the run began with: grid and archives rest on them."""
        scores = None if self._folder is None else self._read_scores(self._folder.lineage_file)
        return self._name_scores(np.asarray(self._hosts.broadcast(scores), np.float32))

    def _read_scores(self, log: Path) -> list[list[float]]:
        births = [b for b in read_births(log) if b.generation == 0]
        names = [birth.operator.get("expert") for birth in births]
        if names != list(self._config.experts):
            raise LineageError(
                f"{log}: expected it to begin with the experts "
                f"{', '.join(self._config.experts)}, found {names}: the log is damaged, restore it "
                "from a copy or start in another folder"
            )
        return [[birth.scores[task] for task in self._config.tasks] for birth in births]

    def _name_scores(self, scores: np.ndarray) -> np.ndarray:
        self.expert_scores = {
            name: [float(score) for score in row]
            for name, row in zip(self._config.experts, scores, strict=True)
        }
        return scores

    def _generation(
        self, search: MAPElites, state: Any, generation: int, lineage: Log
    ) -> tuple[Any, dict[str, Any], Failures]:
        """Breed, score and offer one batch; log every child; return the state and a metrics row."""
        started = time.perf_counter()
        tokens = self._evaluator.generated_tokens
        self.repertoire, growth = self._fitness.grow(self.repertoire, generation)
        grown = time.perf_counter()
        # A key per generation rather than a chain of them: a resumed run needs no stored key.
        children, info = search.ask(
            self.repertoire, state, jax.random.fold_in(self._key, generation)
        )
        parents = np.asarray(self.repertoire.extra_scores["id"])[np.asarray(info["parents"])]
        emitted = time.perf_counter()
        scored = self._fitness.score(children, generation, self.repertoire)
        tokens = self._evaluator.generated_tokens - tokens
        failed = Failures.of(scored.played, scored.scores)
        failed.refuse_blindness(f"generation {generation}", scored.played, scored.scores)
        played = time.perf_counter()
        first = self._evaluations(generation - 1)
        ids = np.arange(first, first + self._config.children, dtype=np.int32)
        offered = jnp.asarray(scored.offered)
        self.repertoire, state, metrics = search.tell(
            genotypes=children,
            fitnesses=offered,
            descriptors=offered,
            repertoire=self.repertoire,
            emitter_state=state,
            extra_scores={"id": jnp.asarray(ids), **self._fitness.kept(scored.solved)},
            extra_info=info,
        )
        self._log_children(lineage, generation, ids, parents, children, info, scored)
        entered = acceptance(
            self.repertoire, jnp.asarray(ids), info["archive"], len(self._config.tasks)
        )
        row = self._row(generation, metrics, scored, tokens)
        row["archive"] = np.unique(info["archive"]).tolist()
        # One number for the archive a child was bred in; an archive without children has 0 of 0.
        row["offered"] = np.asarray(entered.offered).tolist()
        row["accepted"] = np.asarray(entered.accepted).tolist()
        if growth is not None:
            failed += Failures(0, sum(growth.failed.values()), sum(growth.late.values()))
            row["problems"] += problems_of(growth)
        row["failures"] = failed.to_json()
        row["seconds"] = {
            **({"grow": grown - started} if growth is not None else {}),
            "emit": emitted - grown,
            **scored.played.seconds,
            "add": time.perf_counter() - played,
        }
        if hosts := self._hosts.waiting():
            row["hosts"] = hosts
        return state, row, failed

    def _row(
        self, generation: int, metrics: Mapping[str, Any], scored: Scored, tokens: int
    ) -> dict[str, Any]:
        means = np.asarray(self.repertoire.scores).mean(axis=1)
        return {
            "generation": generation,
            "evaluations": self._evaluations(generation),
            **{
                name: [float(value) for value in np.asarray(metrics[name])]
                for name in ("coverage", "qd_score", "best")
            },
            "best_mean": float(means[np.asarray(self.repertoire.occupied)].max()),
            "elites": int(metrics["num_elites"]),
            "tokens": tokens,
            "problems": scored.problems,
            "tokens_per_second": tokens / max(scored.played.seconds["model"], 1e-9),
            **({"device_memory": memory} if (memory := device_memory()) else {}),
        }

    def _log_experts(self, lineage: Log, experts: Any) -> None:
        marks = digests(experts)
        for number, (name, scores) in enumerate(self.expert_scores.items()):
            birth = Birth(
                id=number,
                parents=(),
                archive=None,
                generation=0,
                scores=self._named(scores),
                operator={"expert": name},
                digest=marks[number],
                time=_now(),
            )
            lineage.write(birth.to_row())

    def _log_children(
        self,
        lineage: Log,
        generation: int,
        ids: np.ndarray,
        parents: np.ndarray,
        children: Any,
        info: Mapping[str, Any],
        scored: Scored,
    ) -> None:
        # What the emitter says of a child is its recipe; what the crossover drew is for readers.
        recipe = {name: value for name, value in info.items() if name not in ("parents", "archive")}
        crossover_keys = jax.random.wrap_key_data(info["keys"][:, 0])
        recipe |= self._draw(crossover_keys)
        recipe = {name: np.asarray(value) for name, value in recipe.items()}
        archives, marks, now = np.asarray(info["archive"]), digests(children), _now()
        names = list(self._config.experts)
        for child, id in enumerate(ids.tolist()):
            archive = int(archives[child])
            operator = {name: value[child].tolist() for name, value in recipe.items()}
            birth = Birth(
                id=id,
                parents=tuple(parents[child].tolist()),
                archive=archive,
                generation=generation,
                scores=self._named(scored.scores[child]),
                problems=scored.problems_of(child),
                operator={**operator, "expert": names[self._emitter.experts[archive]]},
                digest=marks[child],
                time=now,
            )
            lineage.write(birth.to_row())

    def _named(self, scores: Any) -> dict[str, float]:
        return dict(zip(self._config.tasks, map(float, scores), strict=True))


def _now() -> float:
    return round(time.time(), 3)
