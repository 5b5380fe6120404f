"""Models of a run as they are handed on: rebuilt from its log, with a card that says all of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cycleqd_jax.qd.aggregation import aggregate
from cycleqd_jax.runs.breeding import first_parents, make_emitter
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.needs import default_mesh
from cycleqd_jax.runs.rebuild import digests, rebuild
from cycleqd_jax.runs.records.files import read_json
from cycleqd_jax.runs.records.folder import RunFiles, read_config
from cycleqd_jax.runs.records.lineage import Birth, FamilyTree, LineageError, read_births
from cycleqd_jax.runs.records.parents import check_parents, licence_of
from cycleqd_jax.runs.results.export import Measured, ModelCard, expert_coefficients, export_model
from cycleqd_jax.runs.results.team import export_team
from cycleqd_jax.runs.workspace import Workspace, open_workspace
from cycleqd_jax.sharding import local_mesh

USE_TEAM = """```python
from cycleqd_jax.runs.results.team import load_team

team = load_team("FOLDER")
params = team.model(team.members[0])  # one member's weights
population = team.population()  # all at once, for a Decoder: candidate i is member i
```"""


class PastRun:
    """A run on disk, finished or not, read without its lock.

    Attributes:
        files: where its parts lie.
        config: its settings.
        family: every model it made.
    """

    def __init__(self, path: Path) -> None:
        """Read config and lineage.

        Raises:
            RunFolderError: no run, or one of another version of the library.
            LineageError: the log is damaged.
        """
        self.files = RunFiles(path)
        self.config = RunConfig.from_json(read_config(path))
        self.family = FamilyTree(read_births(self.files.lineage_file))

    def open(self, cache: Path | None = None) -> Workspace:
        """The models and the basis of the run, checked to be those it began with.

        They go to one device where the run would fit one, or else to its mesh.

        Raises:
            ParentsError: one has changed since.
            ValueError: what `open_workspace` refuses.
        """
        shape = default_mesh(self.config)
        mesh = None if shape[1] == 1 else local_mesh(shape)
        workspace = open_workspace(self.config, cache, mesh)
        check_parents(self.files.parents_file, workspace.folders, workspace.digests)
        return workspace

    def rebuild(self, workspace: Workspace, ids: Sequence[int]) -> Any:
        """Gains of these models, leaves (len(ids), ...); raises as `rebuild`."""
        config = self.config
        births = self.family.first_parents
        if [birth.operator.get("expert") for birth in births] != list(config.experts):
            raise LineageError(
                f"{self.files.lineage_file}: expected it to begin with the experts "
                f"{', '.join(config.experts)}, found {len(births)} first parents: it is incomplete"
            )
        scores = [[birth.scores[task] for task in config.tasks] for birth in births]
        emitter = make_emitter(workspace, np.asarray(scores, np.float32))
        return rebuild(self.family, ids, emitter, first_parents(workspace))

    def finals(self) -> dict[str, Any]:
        """What was put forward at the end of the run.

        Raises:
            ValueError: the run has not come so far.
        """
        if not self.files.finals_file.exists():
            raise ValueError(
                f"{self.files.path}: this run has not chosen its final models yet: start its "
                "command again, or export a child by its number (--id)"
            )
        found: dict[str, Any] = read_json(self.files.finals_file)
        return found


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        folder: where.
        what: in words.
    """

    folder: Path
    what: str


def make_card(
    workspace: Workspace,
    name: str,
    gains: Any,
    scores: Mapping[str, Measured],
    details: Mapping[str, Any],
    command: str,
    usage: str = "",
) -> ModelCard:
    """The card of a model of a run; ``gains`` None leaves the recipe out."""
    config = workspace.config
    recipe = {}
    if gains is not None:
        recipe = expert_coefficients(gains, workspace.layout, list(config.experts))
    return ModelCard(
        name=name,
        base=config.base,
        experts=config.experts,
        licences={name: licence_of(Path(at)) for name, at in workspace.folders.items()},
        recipe=recipe,
        scores=scores,
        command=command,
        details=details,
        usage=usage,
    )


def release(
    run: PastRun, which: str, out: Path, *, command: str = "", cache: Path | None = None
) -> Exported:
    """Write a model of a run, or its team, rebuilt from the log alone.

    Args:
        run: the run.
        which: a number of the lineage, ``best``, ``aggregate`` or ``team``.
        out: a new or empty folder.
        command: this export's, for the card.
        cache: folder where decompositions are kept; None keeps none.

    Raises:
        ValueError: no such model, the run has not chosen yet, a folder that is in use, or what
            rebuilding refuses.
        OSError: the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: expected a new or an empty folder, found something there")
    if which not in ("best", "aggregate", "team") and not which.isdecimal():
        raise ValueError(f"--id: expected a number, best, aggregate or team, found {which!r}")
    finals = {} if which.isdecimal() else run.finals()
    if not finals and run.files.finals_file.exists():
        finals = run.finals()
    if which == "team" and not finals["team"]["ids"]:
        raise ValueError(f"{run.files.path}: there is no team: no finalist solved a problem")
    if which.isdecimal():
        run.family.birth(int(which))
    workspace = run.open(cache)
    lines = "\n".join(line for line in (finals.get("command"), command) if line)
    if which == "team":
        return _release_team(run, workspace, finals, out, lines)
    if which == "aggregate":
        gains = _merge(run, workspace, finals["aggregate"])
        details = {"merged from": ", ".join(f"#{id}" for id in finals["aggregate"]["ids"])}
        scores = _of_finals(run, finals, "aggregate")
    else:
        id = finals["best"]["id"] if which == "best" else int(which)
        gains = jax.tree.map(lambda leaf: leaf[0], run.rebuild(workspace, [id]))
        birth = run.family.birth(id)
        details = _told(birth, run.config)
        scores = _of_child(run, finals, birth)
    name = f"cycleqd/{which}"
    card = make_card(workspace, name, gains, scores, details, lines)
    params = workspace.model(gains)
    like = Path(run.config.base)
    export_model(out, workspace.architecture, params, like=like, card=card)
    return Exported(out, f"{name} of {run.files.path}")


def _merge(run: PastRun, workspace: Workspace, chosen: Mapping[str, Any]) -> Any:
    """The aggregate again, from the best of every archive."""
    ids, tasks = chosen["ids"], run.config.tasks
    quality = [run.family.birth(id).scores[task] for id, task in zip(ids, tasks, strict=True)]
    heads = run.rebuild(workspace, ids)
    temperature = run.config.preset.temperature
    gains = aggregate(heads, jnp.asarray(quality, jnp.float32), temperature)
    found = digests(jax.tree.map(lambda leaf: leaf[None], gains))[0]
    if found != chosen["digest"]:
        raise LineageError(
            f"the aggregate does not come out as it was: expected the digest {chosen['digest']}, "
            f"found {found}; is JAX of another version than in the run?"
        )
    return gains


def _release_team(
    run: PastRun, workspace: Workspace, finals: Mapping[str, Any], out: Path, command: str
) -> Exported:
    team = finals["team"]
    stacked = run.rebuild(workspace, team["ids"])
    members = {
        f"child-{id}": jax.tree.map(lambda leaf, row=row: leaf[row], stacked)
        for row, id in enumerate(team["ids"])
    }
    share = team["covered"] / team["problems"]
    details = {
        "members": ", ".join(members),
        "together they solve": f"{team['covered']} of {team['problems']} validation problems "
        f"({share:.3f}), counting a problem that any member solves; chosen on these problems",
        "each adds": ", ".join(map(str, team["gains"])),
    }
    card = make_card(workspace, "cycleqd/team", None, {}, details, command, USE_TEAM)
    facts = {"run": str(run.files.path), "team": team}
    export_team(out, workspace, members, card=card, facts=facts)
    return Exported(out, f"team of {len(members)} of {run.files.path}")


def _told(birth: Birth, config: RunConfig) -> dict[str, Any]:
    if birth.archive is None:
        return {"lineage": f"#{birth.id}, expert {birth.operator['expert']}"}
    parents = " and ".join(f"#{parent}" for parent in birth.parents)
    return {
        "lineage": f"#{birth.id} of generation {birth.generation}, bred in archive "
        f"{config.tasks[birth.archive]} from {parents}"
    }


def _of_child(run: PastRun, finals: Mapping[str, Any], birth: Birth) -> dict[str, Measured]:
    """What was measured of a model of the lineage, split by split."""
    found = {"search": Measured(birth.scores, min(birth.problems or [run.config.problems]))}
    validated = finals.get("finalists", {}).get(str(birth.id))
    if validated is not None:
        found["validation"] = Measured(validated, finals["problems"])
    if finals and birth.id == finals["best"]["id"]:
        found |= _tested(run, "best")
    return found


def _of_finals(run: PastRun, finals: Mapping[str, Any], which: str) -> dict[str, Measured]:
    return {
        "validation": Measured(finals[which]["scores"], finals["problems"]),
        **_tested(run, which),
    }


def _tested(run: PastRun, which: str) -> dict[str, Measured]:
    if not run.files.summary_file.exists():
        return {}
    scores = read_json(run.files.summary_file)["models"][f"cycleqd/{which}"]
    kept = {task: scores[task] for task in run.config.tasks}
    return {"test": Measured(kept, run.config.test_problems)}
