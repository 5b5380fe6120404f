"""What is looked at before a run: all failures at once, each with what to do."""

import io
import runpy
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cycleqd_jax.runs import needs as needs_module
from cycleqd_jax.runs import preflight as module
from cycleqd_jax.runs.command import Command, parse_command
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.launch import launch
from cycleqd_jax.runs.needs import Device, named_device, needs_of, short_disks
from cycleqd_jax.runs.preflight import NotReady, Preflight, findings_table, plan_text
from cycleqd_jax.runs.watch import Watch
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


def test_without_a_dry_run_an_architecture_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_sandbox", _no_sandbox)
    preflight = Preflight(Command(run=NOWHERE, architecture="llama3.2-1b"))
    preflight.run()
    assert _statuses(preflight)["base"] == "failed"


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
    assert more.besides["experts"] == some.besides["experts"] == 2 * some.plan.memory["weights"]
    assert more.memory > some.memory
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
