"""One run from start to finish: prepare, search, choose, test, report."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from cycleqd_jax.progress import Progress
from cycleqd_jax.runs.compatibility import compatibility_report, compatibility_tables
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.evaluate import Evaluator, Problems
from cycleqd_jax.runs.hosts.processes import ALONE, Hosts, HostsError
from cycleqd_jax.runs.needs import default_mesh
from cycleqd_jax.runs.rebuild import digests
from cycleqd_jax.runs.records.files import read_json, to_json, write_json_atomic
from cycleqd_jax.runs.records.folder import RunFolder, differing_keys
from cycleqd_jax.runs.records.lineage import FamilyTree, read_births
from cycleqd_jax.runs.records.parents import check_parents, record_parents
from cycleqd_jax.runs.results.export import Measured, ModelCard, export_model
from cycleqd_jax.runs.results.finalists import Choice, Finals, choose_finals, choose_uniform
from cycleqd_jax.runs.results.release import make_card
from cycleqd_jax.runs.results.report import results_table, summary
from cycleqd_jax.runs.search import Search
from cycleqd_jax.runs.watching.monitor import Monitor, draw_run
from cycleqd_jax.runs.watching.watch import Watch
from cycleqd_jax.runs.workspace import Workspace, open_workspace
from cycleqd_jax.sandbox import open_sandbox
from cycleqd_jax.sandbox.memo import MemoSandbox
from cycleqd_jax.sharding import local_mesh
from cycleqd_jax.tasks.benchmark import sandbox_limits


@dataclass
class Clock:
    """Seconds a phase took."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to a phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def evolve(
    config: RunConfig,
    out: Path,
    *,
    mesh: tuple[int, int] | None = None,
    train_seconds: float = 0.0,
    transcripts: bool = False,
    watch: Watch | None = None,
    command: str = "",
    cache: Path | None = None,
    console: Console | None = None,
    hosts: Hosts = ALONE,
) -> dict[str, Any]:
    """Run CycleQD and write everything about it to ``out``; return the summary.

    A folder that holds an unfinished run of the same config is resumed from its last checkpoint; a
    finished one is only reported again.

    Args:
        config: what to run.
        out: the run's folder, new or of the same config.
        mesh: sizes of ``population`` and ``model``, all devices of this process together; by
            default as `default_mesh` chooses.
        train_seconds: what making the experts took, for the summary.
        transcripts: write what happened in every episode to ``out/transcripts``.
        watch: what is shown and logged while it runs; by default what `Watch` says.
        command: what reproduces the run, for the model cards.
        cache: folder where decompositions are kept from run to run; None keeps none.
        console: where tables go; by default the terminal's.
        hosts: that run this together, each calling it with the same config; ``out`` is on that of
            process 0, and only there anything is shown or written.

    Raises:
        HostsError: the hosts have other settings, models or decompositions.
        ValueError: bad input, named (see `open_workspace` and `RunFolder.open`).
        SandboxUnavailable: no safe way to run programs here.
        KeyboardInterrupt: Ctrl-C, see `Interrupts`; the same call goes on.
    """
    console = console or Console()
    with RunFolder.open(out, config.to_json()) if hosts.first else nullcontext() as folder:
        finished = folder is not None and folder.summary_file.exists()
        if done := hosts.broadcast(read_json(folder.summary_file) if folder and finished else None):
            if folder is not None:
                _show(console, done, folder)
            return done
        _agree_on_settings(hosts, config)
        clock = Clock()
        shape = mesh or default_mesh(config)
        if shape != (1, 1):
            console.print(f"devices: {shape[0]}x{shape[1]} (population x model)")
        workspace = open_workspace(config, cache, local_mesh(shape))
        _agree_on_models(hosts, workspace)
        if folder is not None:
            if not folder.parents_file.exists():
                record_parents(folder.parents_file, workspace.folders, workspace.digests)
            check_parents(folder.parents_file, workspace.folders, workspace.digests)
            _report_compatibility(console, workspace, folder)
            console.print(
                f"basis: rank {_ranks(workspace)} of each of {len(config.experts)} experts, "
                f"retained energy {workspace.report.mean():.4f} "
                f"(lowest {workspace.report.minimum():.4f})"
            )
        # Drawn before the search: a task with too few problems must say so now.
        final = workspace.problems("validation", config.final_problems, config.seed)
        test = workspace.problems("test", config.test_problems, config.seed)
        limits = sandbox_limits(workspace.tasks)
        with MemoSandbox(open_sandbox(config.sandbox, limits)) as sandbox:
            written = out / "transcripts" if transcripts else None
            evaluator = Evaluator(workspace, sandbox, written, hosts)
            monitor = Monitor(watch or Watch(), folder, config.tasks, config.to_json())
            search = Search(workspace, evaluator, folder, monitor, hosts)
            search.run()
            finals = choose_finals(workspace, evaluator, search.repertoire, final)
            uniform = choose_uniform(workspace, evaluator, final)
            if folder is not None:
                _record(folder, config, finals, uniform, command)
            clock.lap("evolve")
            scores, noise = _test(workspace, evaluator, finals, uniform, test, folder, command)
        if folder is not None:
            _draw(workspace, search, folder, finals.best)
        clock.lap("test")
        metrics = search.metrics()
        result = summary(
            tasks=config.tasks,
            split="test",
            models=scores,
            standard_errors=noise if config.repeats > 1 else None,
            generations=config.generations,
            evaluations=search.evaluations,
            coverage=[float(x) for x in metrics["coverage"]],
            qd_score=[float(x) for x in metrics["qd_score"]],
            seconds={"train": train_seconds, **clock.seconds},
        )
        if folder is not None:
            write_json_atomic(folder.summary_file, result)
            _show(console, result, folder)
        return result


def _agree_on_settings(hosts: Hosts, config: RunConfig) -> None:
    """Refuse hosts with other settings than process 0; their models may lie elsewhere."""
    own = to_json({**config.to_json(), "base": None, "experts": list(config.experts)}, "settings")
    first, *others = hosts.gather(json.dumps(own), "settings")
    for number, found in enumerate(others, start=1):
        if differing := differing_keys(json.loads(found), json.loads(first)):
            raise HostsError(
                f"process {number} was started with other settings than process 0:\n"
                + "".join(f"  {line}\n" for line in differing)
                + "Start the same command on every host"
            )


def _agree_on_models(hosts: Hosts, workspace: Workspace) -> None:
    if hosts.count > 1:
        hosts.agree(dict(workspace.digests), "models", "copy those of one host to the others")
        basis = jax.tree.map(lambda leaf: np.asarray(leaf)[None], workspace.basis)
        hosts.agree(
            digests(basis),
            "decompositions of the experts",
            "they round differently: copy the folder bases of one host's --cache to the others",
        )


def _report_compatibility(console: Console, workspace: Workspace, folder: RunFolder) -> None:
    """Show how the experts relate to each other; a resumed run reads it back."""
    if not folder.compatibility_file.exists():
        write_json_atomic(folder.compatibility_file, compatibility_report(workspace))
    for table in compatibility_tables(read_json(folder.compatibility_file)):
        console.print(table)
    for note in workspace.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _record(
    folder: RunFolder, config: RunConfig, finals: Finals, uniform: Choice, command: str
) -> None:
    """Write down what was chosen and on what; the gains follow from the lineage."""
    tasks = config.tasks
    chosen = {"best": finals.best, "aggregate": finals.aggregate, "uniform": uniform}
    rows = {name: choice.to_json(tasks) for name, choice in chosen.items()}
    (rows["aggregate"]["digest"],) = digests(
        jax.tree.map(lambda leaf: leaf[None], finals.aggregate.gains)
    )
    finalists = {
        str(id): dict(zip(tasks, scores, strict=True)) for id, scores in finals.finalists.items()
    }
    chosen_on = {"split": "validation", "problems": config.final_problems, "command": command}
    write_json_atomic(
        folder.finals_file,
        {**chosen_on, **rows, "team": asdict(finals.team), "finalists": finalists},
    )


def _test(
    workspace: Workspace,
    evaluator: Evaluator,
    finals: Finals,
    uniform: Choice,
    problems: Problems,
    folder: RunFolder | None,
    command: str,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Score the table's models, one in memory at a time, and write the two that are put forward.

    Returns the scores of every model and their standard errors.
    """
    chosen = {
        "merge/uniform": uniform,
        "cycleqd/best": finals.best,
        "cycleqd/aggregate": finals.aggregate,
    }
    models: dict[str, Callable[[], Any]] = {"base": lambda: workspace.base}
    models |= {f"expert/{e}": partial(workspace.expert_params, e) for e in workspace.config.experts}
    models |= {name: partial(workspace.model, choice.gains) for name, choice in chosen.items()}
    scores, noise = {}, {}
    with Progress("test", len(models)) as progress:
        for name, make in models.items():
            params = make()
            played = evaluator.model(params, problems, phase=f"test-{name}")
            row, errors = played.scores[0], played.standard_errors[0]
            noise[name] = dict(zip(workspace.config.tasks, map(float, errors), strict=True))
            scores[name] = dict(zip(workspace.config.tasks, map(float, row), strict=True))
            if folder is not None and name in ("cycleqd/best", "cycleqd/aggregate"):
                choice = chosen[name]
                card = _card(workspace, folder, name, choice, scores[name], command)
                like = Path(workspace.config.base)
                target = folder.best if name == "cycleqd/best" else folder.aggregate
                export_model(target, workspace.architecture, params, like=like, card=card)
            del params  # before the next one is built
            progress.advance(note=f"{name} {row.mean():.3f}")
    return scores, noise


def _card(
    workspace: Workspace,
    folder: RunFolder,
    name: str,
    choice: Choice,
    test: Mapping[str, float],
    command: str,
) -> ModelCard:
    config, scores = workspace.config, {}
    if "id" in choice.details:
        born = FamilyTree(read_births(folder.lineage_file)).birth(choice.details["id"])
        scores["search"] = Measured(born.scores, min(born.problems or [config.problems]))
    chosen_on = dict(zip(config.tasks, choice.scores, strict=True))
    scores["validation"] = Measured(chosen_on, config.final_problems)
    scores["test"] = Measured(test, config.test_problems)
    return make_card(workspace, name, choice.gains, scores, choice.details, command)


def _draw(workspace: Workspace, search: Search, folder: RunFolder, best: Choice) -> None:
    config, repertoire = workspace.config, search.repertoire
    # The star stands where the archives hold the model; its scores as a finalist are of others.
    ids = np.where(repertoire.occupied, repertoire.extra_scores["id"], -1)
    slot = int(np.argmax(ids == best.details["id"]))
    scores = np.asarray(repertoire.scores)[slot]
    draw_run(
        folder, repertoire, config.tasks, search.expert_scores, config.generations, best=scores
    )


def _ranks(workspace: Workspace) -> str:
    leaves = workspace.layout.leaves
    ranks = [rank for leaf in leaves if leaf.role == "matrix" for rank in leaf.ranks]
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


def _show(console: Console, result: Mapping[str, Any], folder: RunFolder) -> None:
    models, tasks = result["models"], result["tasks"]
    console.print(results_table(models, tasks, errors=result.get("standard_errors")))
    console.print(f"archives: {folder.archives_picture}   curves: {folder.curves_picture}")
    console.print(f"best model: {folder.best}", soft_wrap=True)
    team = read_json(folder.finals_file)["team"]
    if team["ids"]:
        console.print(
            f"team of {len(team['ids'])}: solves {team['covered']} of {team['problems']} "
            f"validation problems together (python -m cycleqd_jax.export {folder.path} --id team "
            "--out DIR)",
            soft_wrap=True,
        )
