"""A whole run: what it writes, that it resumes exactly, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cycleqd_jax.models.convert import load_model, save_model
from cycleqd_jax.qd.presets import DEFAULT
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.driver import evolve
from cycleqd_jax.runs.evaluate import Evaluator
from cycleqd_jax.runs.family import Family
from cycleqd_jax.runs.records.folder import RunFolderError
from cycleqd_jax.runs.records.jsonl import read_jsonl
from cycleqd_jax.runs.records.lineage import read_births

TASKS = ("coding", "database", "shell")
ROWS = [
    "base",
    "expert/coding",
    "expert/database",
    "expert/shell",
    "merge/uniform",
    "cycleqd/best",
    "cycleqd/aggregate",
]


def test_a_run_writes_everything_it_promises(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary["models"]) == ROWS
    for scores in summary["models"].values():
        assert list(scores) == [*TASKS, "mean"]
        assert scores["mean"] == pytest.approx(np.mean([scores[task] for task in TASKS]))
    assert summary["tasks"] == list(TASKS)
    assert summary["split"] == "test"
    assert (summary["generations"], summary["evaluations"]) == (4, 3 + 4 * 4)
    assert set(summary["seconds"]) == {"train", "evolve", "test"}
    metrics = read_jsonl(finished / "metrics.jsonl")
    assert [row["generation"] for row in metrics] == [1, 2, 3, 4]
    assert {"coverage", "qd_score", "best", "seconds", "tokens_per_second"} <= set(metrics[0])
    for row in metrics:
        assert row["offered"] == [4 * (k in row["archive"]) for k in range(3)]
        assert all(a <= o for a, o in zip(row["accepted"], row["offered"], strict=True))
    for picture in ("archives.png", "curves.png"):
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")


def test_the_lineage_names_every_child_and_its_parents(finished: Path) -> None:
    births = read_births(finished / "lineage.jsonl")
    assert [birth.id for birth in births] == list(range(3 + 4 * 4))
    assert [birth.operator.get("expert") for birth in births[:3]] == list(TASKS)
    for birth in births[3:]:
        assert birth.archive == (birth.generation - 1) % 3  # the archives take turns
        assert len(birth.parents) == 2
        assert all(births[p].generation < birth.generation for p in birth.parents)


def test_exported_models_load_like_any_other(finished: Path, config: RunConfig) -> None:
    for name in ("best", "aggregate"):
        architecture, params = load_model(finished / name)
        assert architecture == load_model(config.base)[0]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        assert "cycleqd" in (finished / name / "README.md").read_text()


def test_a_finished_run_is_only_reported_again(
    finished: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cycleqd_jax.runs.driver.open_workspace", _fail)
    assert evolve(config, finished) == json.loads((finished / "summary.json").read_text())


def test_another_config_is_refused_and_nothing_is_lost(finished: Path, config: RunConfig) -> None:
    before = (finished / "config.json").read_text()
    with pytest.raises(RunFolderError, match="seed"):
        evolve(replace(config, seed=1), finished)
    assert (finished / "config.json").read_text() == before


@pytest.mark.slow
def test_an_interrupted_run_resumes_bit_for_bit(
    finished: Path, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Evaluator.population, []

    def dies_in_the_fourth_generation(self: Evaluator, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1 + 4:  # the experts, then a call a generation
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "population", dies_in_the_fourth_generation)
        with pytest.raises(KeyboardInterrupt):
            evolve(config, tmp_path / "run")
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 3
    evolve(config, tmp_path / "run")
    assert _lineage(tmp_path / "run") == _lineage(finished)
    for name in ("best", "aggregate"):
        first, second = (load_model(run / name)[1] for run in (finished, tmp_path / "run"))
        assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
    theirs, ours = (
        json.loads((r / "summary.json").read_text()) for r in (finished, tmp_path / "run")
    )
    assert {**theirs, "seconds": 0} == {**ours, "seconds": 0}


@pytest.mark.slow
def test_a_score_that_is_not_finite_is_recorded_and_never_enters(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Evaluator.population

    def loses_every_first_candidate(self: Evaluator, gains: Any, *args: Any, **kwargs: Any) -> Any:
        played = real(self, gains, *args, **kwargs)
        if len(played.scores) == config.children:
            played.scores[0, 1] = np.nan
        return played

    monkeypatch.setattr(Evaluator, "population", loses_every_first_candidate)
    evolve(replace(config, generations=2), tmp_path / "run")
    births = read_births(tmp_path / "run" / "lineage.jsonl")
    lost = [b.id for b in births if np.isnan(b.scores["database"])]
    assert lost == [3, 7]
    assert not set(lost) & {p for b in births for p in b.parents}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("coding", "knitting")}, "knitting"),
        ({"tasks": ("coding",)}, "at least two tasks"),
        ({"tasks": ("coding", "coding")}, "each task once"),
        ({"base": "/nowhere"}, "/nowhere"),
        ({"generations": 0}, "generations: expected at least 1, found 0"),
        (
            {"preset": replace(DEFAULT, mutation_strength=-1.0)},
            "mutation_strength: expected at least 0",
        ),
        ({"uniform_scales": ()}, "uniform_scales"),
    ],
)
def test_bad_settings_are_named(
    config: RunConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evolve(replace(config, **change), tmp_path / "run")


def test_fewer_than_two_experts_are_refused(config: RunConfig) -> None:
    one = dict(list(config.experts.items())[:1])
    with pytest.raises(ValueError, match=r"at least two experts, found 1 \(coding\)"):
        replace(config, experts=one)


def test_an_expert_of_another_architecture_is_refused(
    config: RunConfig, family: Family, tmp_path: Path
) -> None:
    architecture, params = load_model(family.base)
    other = replace(architecture, rope_theta=500_000.0)
    save_model(tmp_path / "odd", other, params, like=family.base)
    experts = {**config.experts, "shell": str(tmp_path / "odd")}
    with pytest.raises(ValueError, match=r"odd.*rope_theta"):
        evolve(replace(config, experts=experts), tmp_path / "run")


def test_an_expert_with_another_tokenizer_is_refused(
    config: RunConfig, family: Family, tmp_path: Path
) -> None:
    shutil.copytree(family.experts["shell"], tmp_path / "odd")
    template = tmp_path / "odd" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    experts = {**config.experts, "shell": str(tmp_path / "odd")}
    with pytest.raises(ValueError, match=r"odd.*chat template"):
        evolve(replace(config, experts=experts), tmp_path / "run")


def test_a_sandbox_that_cannot_start_ends_the_run_before_the_search(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cycleqd_jax.sandbox import SandboxUnavailable

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match="install"):
        evolve(config, tmp_path / "run")
    assert not (tmp_path / "run" / "lineage.jsonl").exists()


def _lineage(run: Path) -> list[dict[str, Any]]:
    """The log without the time of day."""
    return [{**row, "time": 0} for row in read_jsonl(run / "lineage.jsonl")]


def _fail(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this must not be called again")
