"""Before anything long: everything a run needs is looked at, and all that is missing said at once.

No weight is read but the headers. One problem of every task is played for real, by an agent that
says what the problem's own demonstration says.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.markup import escape
from rich.table import Table

from cycleqd_jax.models.compatibility import check_family
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.convert import load_config
from cycleqd_jax.models.tokenizer import load_tokenizer
from cycleqd_jax.plan import describe
from cycleqd_jax.runs.command import Command
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.hosts.processes import ALONE, Hosts
from cycleqd_jax.runs.needs import (
    Device,
    Needs,
    default_mesh,
    device_here,
    named_device,
    needs_of,
    short_disks,
)
from cycleqd_jax.runs.policy import Conversations
from cycleqd_jax.runs.watching.loggers import check_loggers
from cycleqd_jax.sandbox import (
    Job,
    Limits,
    Sandbox,
    SandboxBroken,
    SandboxUnavailable,
    open_sandbox,
)
from cycleqd_jax.sharding import abstract_mesh, check_model, local_mesh, mesh_shape
from cycleqd_jax.tasks.base import Problem, Request, ServiceGone, Split, Task
from cycleqd_jax.tasks.benchmark import sandbox_limits
from cycleqd_jax.tasks.policies import ideal_policy
from cycleqd_jax.tasks.registry import make_task
from cycleqd_jax.tasks.rollout import TimeLimits, rollout
from cycleqd_jax.workload import MODELS, Workload

Status = Literal["ok", "failed", "skipped"]
T = TypeVar("T")

# What a user can mend; anything else is a bug and keeps its traceback.
_MENDABLE = (ValueError, OSError, ImportError, SandboxUnavailable, SandboxBroken, ServiceGone)
# What a run draws: split and setting, as in `driver.evolve`.
_DRAWN: tuple[tuple[Split, str], ...] = (
    ("search", "problems"),
    ("validation", "final_problems"),
    ("test", "test_problems"),
)


# Public benchmarks do not say of every problem what solves it.
_PLAYED = 8


class NotReady(ValueError):  # noqa: N818 (a state of the machine, not a bug)
    """A run cannot start; the message lists every reason."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was looked at.
        status: "ok", "failed", or "skipped" where it could not be looked at.
        said: what was found, or what was expected and what was found.
        advice: what to do about a failure.
    """

    check: str
    status: Status
    said: str
    advice: str = ""


class Preflight:
    """All checks of a run; ``findings``, ``needs`` and ``mesh`` are there after `run`.

    Args:
        command: what is to run.
        hosts: that run it together; each looks at itself, and all learn what failed anywhere.
    """

    def __init__(self, command: Command, hosts: Hosts = ALONE) -> None:
        self._command = command
        self._hosts = hosts
        self._config = command.run
        self.findings: list[Finding] = []
        self.needs: Needs | None = None
        self.mesh: tuple[int, int] | None = None

    def run(self) -> list[Finding]:
        """Do every check, whatever the others find."""
        architecture = self._models()
        tasks = self._tasks()
        with self._sandbox(tasks.values()) as sandbox:
            played = [self._play(name, task, sandbox) for name, task in tasks.items()]
        problems = [problem for drawn in played for problem in drawn]
        if architecture is None:
            self._note("memory", "skipped", "the base's folder is needed to plan it")
            self._note("disk", "skipped", "the base's folder is needed to plan it")
        else:
            self._machine(architecture, self._longest(problems))
        if self._command.watch.log and self._hosts.first:
            names = self._command.watch.log
            self._try("loggers", lambda: check_loggers(names), lambda _: ", ".join(names), "")
        self._share()
        return self.findings

    def _share(self) -> None:
        """Add what failed on other hosts to what process 0 found."""
        rows = [asdict(finding) for finding in self.findings]
        first, *others = self._hosts.gather(rows, "checks")
        self.findings = [Finding(**row) for row in first]
        for number, found in enumerate(others, start=1):
            for row in found:
                if row["status"] == "failed":
                    self.findings.append(
                        Finding(**{**row, "check": f"process {number}, {row['check']}"})
                    )

    def refuse(self) -> None:
        """Raise if anything failed.

        Raises:
            NotReady: with every failure and what to do about it.
        """
        failed = [finding for finding in self.findings if finding.status == "failed"]
        if not failed:
            return
        lines = [f"{len(failed)} of {len(self.findings)} checks failed, nothing was started:"]
        for finding in failed:
            lines.append(f"- {finding.check}: {finding.said}")
            if finding.advice:
                lines.append(f"  {finding.advice}")
        raise NotReady("\n".join(lines))

    def _note(self, check: str, status: Status, said: str, advice: str = "") -> None:
        self.findings.append(Finding(check, status, said, advice))

    def _try(
        self, check: str, look: Callable[[], T], say: Callable[[T], str], advice: str
    ) -> T | None:
        """Note what ``look`` returns, or why it could not."""
        try:
            found = look()
        except _MENDABLE as error:
            self._note(check, "failed", str(error), advice)
            return None
        self._note(check, "ok", say(found))
        return found

    def _models(self) -> LlamaConfig | None:
        """Check the folders; the architecture, if it is known."""
        config = self._config
        base = Path(config.base)
        folders = {name: Path(folder) for name, folder in config.experts.items()}
        planned = self._planned_architecture()
        for name, folder in {"base": base, **folders}.items():
            if folder.is_dir():
                continue
            status: Status = "skipped" if planned else "failed"
            flag = "--base DIR" if name == "base" else f"--experts {name}=DIR …"
            self._note(
                name, status, f"{folder} is not there", f"put the model there or give {flag}"
            )
        if not base.is_dir():
            return planned
        present = {name: folder for name, folder in folders.items() if folder.is_dir()}
        self._try(
            "compatibility",
            lambda: check_family(base, present),
            lambda notes: "; ".join(notes) or f"base and {len(present)} experts can be merged",
            "choose experts that were fine-tuned from this very base",
        )
        try:
            return load_config(base)
        except _MENDABLE:  # said by the check above
            return None

    def _planned_architecture(self) -> LlamaConfig | None:
        """What a dry run plans with while the folders are not there."""
        name = self._command.architecture
        if name is None or not self._command.dry_run:
            return None
        if name not in MODELS:
            said = f"--architecture: expected one of {', '.join(MODELS)}, found {name!r}"
            self._note("architecture", "failed", said)
        return MODELS.get(name)

    def _tasks(self) -> dict[str, Task]:
        """Make every task, each for itself."""
        made = {}
        for name in self._config.tasks:
            try:
                made[name] = make_task(name)
            except _MENDABLE as error:
                self._note(f"task {name}", "failed", str(error), "see --tasks in --help")
        return made

    def _sandbox(self, tasks: Iterable[Task]) -> AbstractContextManager[Sandbox | None]:
        """Start the sandbox and run a program in it; None where that fails."""
        limits = sandbox_limits(tasks)
        sandbox = self._try(
            "sandbox",
            lambda: _alive(self._config.sandbox, limits),
            lambda found: f"{self._config.sandbox}: runs Python and bash",
            "no program of a model runs outside of one: install bubblewrap, or see --sandbox",
        )
        return nullcontext() if sandbox is None else sandbox

    def _play(self, name: str, task: Task, sandbox: Sandbox | None) -> Sequence[Problem]:
        """Draw a task's problems as the run will, and play one; the search problems."""
        check, config = f"task {name}", self._config
        try:
            drawn = [
                task.problems(
                    split, getattr(config, count), seed=config.seed, difficulty=config.difficulty
                )
                for split, count in _DRAWN
            ]
        except _MENDABLE as error:
            counts = ", ".join(f"--{count.replace('_', '-')}" for _, count in _DRAWN)
            self._note(check, "failed", str(error), f"see {counts}")
            return []
        if sandbox is None:
            self._note(check, "skipped", "drawn, not played: there is no sandbox")
            return drawn[0]
        self._try(
            check,
            lambda: play_ideally(task, drawn[0][:_PLAYED], sandbox, config),
            lambda score: f"its own answer to a problem scores {score:g}",
            "its files, its server or the sandbox are not what it expects",
        )
        return drawn[0]

    def _longest(self, problems: Sequence[Problem]) -> int | None:
        """Tokens of the longest conversation before its last answer, where that can be told."""
        if not problems:
            return None
        try:
            conversations = Conversations(load_tokenizer(self._config.base))
            requests = [Request(0, problem.demonstration[:-1]) for problem in problems]
            return max(map(len, conversations.render(requests)))
        except _MENDABLE:  # a base without tokenizer is refused by the check of the models
            return None

    def _machine(self, architecture: LlamaConfig, longest: int | None) -> None:
        """Hold memory and disks against what is needed."""
        config = self._config
        prompt = longest or Workload.prompt
        try:
            device = _device(self._command)
            mesh = _mesh(self._command, architecture, device, prompt)
        except ValueError as error:
            self._note("mesh", "failed", str(error), "see --mesh and --chip")
            self._note("memory", "skipped", "the mesh is needed to plan it")
            self._note("disk", "skipped", "the mesh is needed to plan it")
            return
        try:
            self.needs = needs = needs_of(config, architecture, prompt, mesh)
        except ValueError as error:
            self._note("memory", "failed", str(error), "see --max-new-tokens")
            return
        self.mesh = mesh
        tokens = f"{prompt} tokens of conversation" + ("" if longest else ", assumed")
        where = device.name
        if mesh != (1, 1):
            where = f"each of {math.prod(mesh)} {device.name}, mesh {mesh[0]}x{mesh[1]}"
        said = f"{_gb(needs.memory)} of {_gb(device.memory)} on {where} ({tokens})"
        if needs.memory <= device.memory:
            self._note("memory", "ok", said)
        else:
            largest = max(needs.phases[needs.busiest].items(), key=lambda part: part[1])
            advice = (
                f"most of it, {_gb(largest[1])}, is for {largest[0]}: a lower --rank, fewer "
                "--children or --problems, a larger device, or more of them (--mesh)"
            )
            self._note("memory", "failed", f"needs {said}", advice)
        out, cache = self._command.out, self._command.cache
        written = needs.out if self._hosts.first else 0
        short = short_disks([(out, written), (cache, needs.cache)])
        for folder, wanted, free in short:
            said = f"needs up to {_gb(wanted)} for {folder}, found {_gb(free)} free"
            self._note("disk", "failed", said, "make room, or see --out and --cache")
        if not short:
            said = f"up to {_gb(written)} in {out} and {_gb(needs.cache)} in {cache}: there"
            self._note("disk", "ok", said)


def play_ideally(
    task: Task, problems: Sequence[Problem], sandbox: Sandbox, config: RunConfig
) -> float:
    """Play problems by their own demonstrations and return the best score.

    Raises:
        ValueError: all score 0, or one takes too long, or the episode raises an error.
        ServiceGone, SandboxBroken: what the task needs is lost.
    """
    played = rollout(
        [task],
        {task.name: problems},
        1,
        ideal_policy(problems),
        sandbox,
        limits=TimeLimits(step=config.step_seconds, episode=config.episode_seconds),
    )
    score = float(played.solved[task.name].max())
    if played.errors:
        raise ValueError(f"a problem played by its own answer fails: {played.errors[0]}")
    if played.late[task.name]:
        raise ValueError(
            f"a problem played by its own answer takes more than {config.step_seconds:g} s a "
            f"program or {config.episode_seconds:g} s in all: see --step-seconds"
        )
    if not score > 0:
        raise ValueError(
            f"a problem's own answer: expected a score above 0, found {score:g} for "
            f"{problems[0].prompt[:80]!r}"
        )
    return score


def findings_table(findings: Sequence[Finding]) -> Table:
    """The findings for people."""
    table = Table(title="before the run", show_lines=False)
    for column in ("check", "", "found"):
        table.add_column(column)
    colours = {"ok": "green", "failed": "bold red", "skipped": "yellow"}
    for finding in findings:
        said = finding.said if finding.status == "ok" else f"{finding.said}\n{finding.advice}"
        status = f"[{colours[finding.status]}]{finding.status}[/]"
        table.add_row(escape(finding.check), status, escape(said.strip()))
    return table


def plan_text(command: Command, needs: Needs | None) -> str:
    """What the run is going to do, and what a generation costs."""
    config = command.run
    episodes = config.children * config.problems * config.repeats * len(config.tasks)
    cells = config.preset.bins ** (len(config.tasks) - 1)
    lines = [
        f"{config.generations} generations of {config.children} children, "
        f"{len(config.tasks)} archives of {cells:,} cells",
        f"{episodes:,} episodes a generation, {episodes * config.generations:,} in all, "
        f"then {config.final_problems} problems a task for {config.finalists} finalists and "
        f"{config.test_problems} for the table",
    ]
    if needs is None:
        return "\n".join(lines)
    device = _device(command)
    lines.append("")
    if device.chip is not None:
        lines += [describe(needs.plan, device.chip), ""]
    lines.append(f"{'memory of each device':30s} {'GB':>8s}")
    for phase, parts in needs.phases.items():
        lines.append(f"  {phase:28s} {sum(parts.values()) / 1e9:8.2f}")
        if phase == needs.busiest:
            lines += [f"    {part:26s} {size / 1e9:8.2f}" for part, size in parts.items()]
    return "\n".join(lines)


def _alive(kind: Any, limits: Limits) -> Sandbox:
    sandbox = open_sandbox(kind, limits)
    jobs = [Job("python", "print(1 + 1)"), Job("bash", "echo $((1 + 1))")]
    try:
        outcomes = sandbox.run(jobs)
        for job, outcome in zip(jobs, outcomes, strict=True):
            if outcome.stdout != "2\n":
                raise ValueError(f"a {job.kind} program should print 2, found {outcome}")
    except BaseException:
        sandbox.close()
        raise
    return sandbox


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"


def _device(command: Command) -> Device:
    """What a run computes on; only a dry run may plan for a device that is not here."""
    if command.dry_run and command.chip is not None:
        shape = (1, 1) if command.mesh is None else mesh_shape(command.mesh)
        return named_device(command.chip, math.prod(shape))
    return device_here()


def _mesh(
    command: Command, architecture: LlamaConfig, device: Device, prompt: int
) -> tuple[int, int]:
    """The mesh that is asked for, or that fits.

    Raises:
        ValueError: it is none, has another size than there are devices or does not divide the
            model.
    """
    if command.mesh is None:
        shape = default_mesh(command.run, architecture, device, prompt)
    else:
        shape = mesh_shape(command.mesh)
        if not command.dry_run or command.chip is None:
            local_mesh(shape)
    check_model(architecture, abstract_mesh(shape))
    return shape
