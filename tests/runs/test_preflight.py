"""What is looked at before a run: all failures at once, each with what to do."""

import io
import runpy
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cycleqd_jax.runs import needs as needs_module
from cycleqd_jax.runs import preflight as module
from cycleqd_jax.runs.command import Command, parse_command
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.hosts.processes import Hosts
from cycleqd_jax.runs.launch import launch
from cycleqd_jax.runs.needs import Device, default_mesh, named_device, needs_of, short_disks
from cycleqd_jax.runs.preflight import NotReady, Preflight, findings_table, plan_text
from cycleqd_jax.runs.watching.watch import Watch
from cycleqd_jax.sandbox import SandboxUnavailable
from cycleqd_jax.tasks.base import Ask, Message, Problem
from cycleqd_jax.workload import MODELS

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NOWHERE = RunConfig(
    base="/nowhere/base",
    experts={"coding": "/nowhere/coding", "shell": "/nowhere/shell"},
    tasks=("coding", "shell"),
    problems=2,
    final_problems=2,
    test_problems=2,
)


def _statuses(preflight: Preflight) -> dict[str, str]:
    return {finding.check: finding.status for finding in preflight.findings}


def _no_sandbox(*arguments: Any) -> Any:
    raise SandboxUnavailable("install bubblewrap")


def test_all_that_is_missing_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_sandbox", _no_sandbox)
    monkeypatch.setitem(sys.modules, "wandb", None)
    command = Command(
        run=replace(NOWHERE, tasks=("coding", "chess")), watch=Watch(log=("wandb",)), out=tmp_path
    )
    preflight = Preflight(command)
    preflight.run()
    with pytest.raises(NotReady) as caught:
        preflight.refuse()
    message = str(caught.value)
    assert "6 of 9 checks failed, nothing was started" in message
    for text in (
        "- base: /nowhere/base is not there\n  put the model there or give --base DIR",
        "- coding: /nowhere/coding is not there\n  put the model there or give --experts",
        "- task chess: expected task names among",
        "- sandbox: install bubblewrap\n  no program of a model runs outside",
        "- loggers: --log wandb: expected the package wandb",
    ):
        assert text in message
    assert {"task coding": "skipped", "memory": "skipped", "disk": "skipped"}.items() <= _statuses(
        preflight
    ).items()


def test_a_dry_run_without_weights_plans_by_the_architecture(tmp_path: Path) -> None:
    command = Command(
        run=replace(NOWHERE, rank=64, children=4),
        out=tmp_path / "run",
        cache=tmp_path / "cache",
        dry_run=True,
        architecture="llama3.2-1b",
        chip="h200",
    )
    console = Console(width=200, record=True, file=io.StringIO())
    launch(command, console=console)
    said = console.export_text()
    assert "3 experts" not in said
    assert "2 experts at rank 64" in said
    assert "DOES NOT FIT" not in said
    assert "float32 factors" in said
    assert said.count("its own answer to a problem scores 1") == 2
    assert "60 generations of 4 children, 2 archives of 15 cells" in said
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


class SecondHost(Hosts):
    """This host and another one, which has no sandbox."""

    def gather(self, value: Any, what: str) -> list[Any]:
        row = {"check": "sandbox", "said": "none", "advice": "install it"}
        return [value, [{**row, "status": "failed"}, {**row, "check": "disk", "status": "ok"}]]


def test_what_fails_on_another_host_is_said_with_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "open_sandbox", _no_sandbox)
    preflight = Preflight(Command(run=NOWHERE), SecondHost())
    preflight.run()
    assert _statuses(preflight)["sandbox"] == "failed"  # its own
    assert preflight.findings[-1].check == "process 1, sandbox"
    with pytest.raises(NotReady, match="- process 1, sandbox: none\n  install it"):
        preflight.refuse()


def test_without_a_dry_run_an_architecture_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_sandbox", _no_sandbox)
    preflight = Preflight(Command(run=NOWHERE, architecture="llama3.2-1b"))
    preflight.run()
    assert _statuses(preflight)["base"] == "failed"


@pytest.mark.slow
def test_a_family_that_is_there_passes(config: RunConfig, tmp_path: Path) -> None:
    preflight = Preflight(Command(run=config, out=tmp_path / "run", cache=tmp_path / "cache"))
    preflight.run()
    preflight.refuse()
    assert _statuses(preflight) == dict.fromkeys(
        ["compatibility", "sandbox", *(f"task {name}" for name in config.tasks), "memory", "disk"],
        "ok",
    )
    (memory,) = (finding for finding in preflight.findings if finding.check == "memory")
    assert "assumed" not in memory.said  # the longest conversation was measured
    assert plan_text(Command(run=config), preflight.needs).count("\n") > 8
    assert findings_table(preflight.findings).row_count == len(preflight.findings)


@pytest.mark.parametrize(
    ("patched", "value", "message"),
    [
        ("device_here", lambda: Device("tiny", 1000), "memory: needs .* of 0.0 GB on tiny"),
        ("short_disks", lambda wanted: [(wanted[0][0], 2 * 10**9, 10**9)], "disk: needs up to 2.0"),
    ],
)
def test_too_little_room_is_said_with_what_to_change(
    patched: str,
    value: Any,
    message: str,
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, patched, value)
    monkeypatch.setattr(module, "open_sandbox", _no_sandbox)
    preflight = Preflight(Command(run=config, out=tmp_path / "run"))
    preflight.run()
    with pytest.raises(NotReady, match=message):
        preflight.refuse()
    (advice,) = (f.advice for f in preflight.findings if f.check in message)
    assert "--rank" in advice or "--out" in advice


def test_an_answer_that_does_not_fit_the_context_is_refused() -> None:
    config = replace(NOWHERE, max_new_tokens=8000)
    with pytest.raises(ValueError, match="do not fit the context"):
        needs_of(config, MODELS["llama3-8b"], 512)


def test_needs_grow_with_what_they_are_made_of() -> None:
    model = replace(MODELS["llama3.2-1b"], num_layers=2)
    some = needs_of(replace(NOWHERE, rank=16), model, 128)
    more = needs_of(replace(NOWHERE, rank=32), model, 128)
    assert more.cache == pytest.approx(2 * some.cache, rel=0.05)
    assert more.memory > some.memory
    # The experts are never there as a whole: a run holds two models at most, base and one other.
    weights = some.plan.memory["weights"]
    for phase, parts in some.phases.items():
        models = [part for part, size in parts.items() if size == weights]
        assert len(models) == {"decomposition": 0, "report": 1, "search": 1, "test": 2}[phase]
    assert some.memory == sum(some.phases[some.busiest].values())
    longer = needs_of(replace(NOWHERE, rank=16, generations=120), model, 128)
    assert longer.out == some.out  # the archives are full: 2 tasks of 15 cells
    fewer = needs_of(replace(NOWHERE, rank=16, generations=1, children=1), model, 128)
    assert fewer.out < some.out
    # A full rank is the largest there is.
    full = needs_of(NOWHERE, model, 128)
    assert full.plan.memory["factors"] > more.plan.memory["factors"]


def test_an_unknown_chip_is_named() -> None:
    with pytest.raises(ValueError, match=r"--chip: expected one of a100, .*, found 'abacus'"):
        named_device("abacus")


def test_folders_of_one_disk_share_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs_module, "free_disk", lambda folder: 100)
    out, cache = tmp_path / "new" / "run", tmp_path / "cache"
    assert short_disks([(out, 60), (cache, 40)]) == []
    assert short_disks([(out, 60), (cache, 41)]) == [(out, 101, 100)]


@dataclass
class Odd:
    """A task whose episodes end as they are told."""

    ends: str
    name: str = "odd"

    def problems(
        self, split: str, count: int, *, seed: int = 0, difficulty: int = 1
    ) -> Sequence[Problem]:
        if self.ends == "few":
            raise ValueError("expected 2 problems, found 1")
        return [
            Problem(prompt=f"{n}", answers=("a",), solution="a", document="", kind="k")
            for n in range(count)
        ]

    def episode(self, problem: Problem) -> Generator[Any, Any, float]:
        yield Ask((Message("user", problem.prompt),))
        if self.ends == "raise":
            raise RuntimeError("no server at this address")
        return float(self.ends)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ("raise", "fails: .*no server at this address"),
        ("0", "expected a score above 0, found 0 for '0'"),
        ("few", r"expected 2 problems, found 1\n  see --problems"),
    ],
)
def test_a_task_that_cannot_be_played_is_found_out(
    ends: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "make_task", lambda name: Odd(ends if name == "shell" else "1"))
    preflight = Preflight(Command(run=NOWHERE))
    preflight.run()
    statuses = _statuses(preflight)
    assert (statuses["task coding"], statuses["task shell"]) == ("ok", "failed")
    with pytest.raises(NotReady, match=message):
        preflight.refuse()


def test_the_setting_of_the_paper_is_a_config_of_the_same_program() -> None:
    settings = runpy.run_path(str(EXPERIMENTS / "llama3_8b.py"))["SETTINGS"]
    command = parse_command(["--chip", "h200", "--dry-run"], defaults=settings)
    run = command.run
    assert (run.generations, run.preset.bins, len(run.experts)) == (1200, 15, 3)
    assert run.preset.mutation == "child_svd"
    assert run.tasks == ("mbpp+/paper", "dbbench/paper", "osbench/paper")
    assert command.architecture is not None
    needs = needs_of(run, MODELS[command.architecture], 512)
    assert needs.memory <= named_device("h200").memory
    changed = parse_command(["--bins", "3", "--rank", "8"], defaults=settings).run
    assert (changed.preset.bins, changed.rank, changed.preset.mutation) == (3, 8, "child_svd")


def test_a_mesh_splits_what_it_is_there_to_split() -> None:
    config, model = (
        replace(NOWHERE, rank=16, children=6, problems=5),
        replace(MODELS["llama3.2-1b"], num_layers=2),
    )
    one, halves = needs_of(config, model, 128), needs_of(config, model, 128, (1, 2))
    assert halves.plan.memory["weights"] < 0.51 * one.plan.memory["weights"]
    assert (halves.out, halves.cache) == (one.out, one.cache)
    # 6 children of 10 texts are 60 rows, which the decoder fills up to 64.
    eight = needs_of(config, model, 128, (8, 1))
    assert eight.plan.work.rows % 8 == 0
    assert eight.plan.memory["cache"] * 8 < 1.5 * one.plan.memory["cache"]


@pytest.mark.parametrize(
    ("memory", "expected"), [(100, (8, 1)), (50, (4, 2)), (49, (2, 4)), (1, (2, 4))]
)
def test_by_default_weights_are_split_as_often_as_they_have_to(
    memory: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs(config: Any, architecture: Any, prompt: int, mesh: tuple[int, int]) -> Any:
        if mesh[1] == 8:
            raise ValueError("four key heads")
        return SimpleNamespace(memory=100 // mesh[1])

    monkeypatch.setattr(needs_module, "needs_of", needs)
    device, model = Device("chip", memory, count=8), MODELS["qwen2.5-7b"]
    # What does not fit at all is said by the check of the memory.
    assert default_mesh(NOWHERE, model, device) == expected
    assert default_mesh(NOWHERE, device=Device("chip", 1)) == (1, 1)  # there is nothing to choose


@pytest.mark.parametrize(
    ("mesh", "chip", "message"),
    [
        ("64x1", None, "mesh: a mesh of 64x1 .* needs 64 devices, found 1"),
        ("1x16", "h200", "mesh: the mesh does not divide the model: leaf layers.k has 8 key heads"),
        ("eight", "h200", "mesh: expected a mesh as POPULATIONxMODEL, such as 8x1 or 4x2, found"),
    ],
)
def test_a_mesh_that_cannot_be_is_found_before_anything_long(
    mesh: str, chip: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_sandbox", _no_sandbox)
    command = Command(run=NOWHERE, mesh=mesh, dry_run=True, architecture="llama3.2-1b", chip=chip)
    preflight = Preflight(command)
    preflight.run()
    assert _statuses(preflight)["memory"] == "skipped"
    with pytest.raises(NotReady, match=message):
        preflight.refuse()


def test_a_dry_run_plans_for_a_mesh_that_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_sandbox", _no_sandbox)
    command = Command(
        run=replace(NOWHERE, rank=64),
        out=tmp_path,
        mesh="4x2",
        dry_run=True,
        architecture="llama3.2-1b",
        chip="h200",
    )
    preflight = Preflight(command)
    preflight.run()
    (memory,) = (finding for finding in preflight.findings if finding.check == "memory")
    assert memory.status == "ok"
    assert "on each of 8 h200, mesh 4x2" in memory.said
    assert "mesh 4x2 (population x model) of h200" in plan_text(command, preflight.needs)
