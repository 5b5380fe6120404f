import gc
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install '.[lm-eval]'")

from rich.console import Console

from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.family import Family
from cycleqd_jax.runs.language import retention
from cycleqd_jax.runs.language.local_tasks import arc_easy
from cycleqd_jax.runs.language.retention import (
    Tasks,
    each_model,
    models_of_run,
    population_of,
    retention_table,
    scores_of,
)
from cycleqd_jax.runs.records.folder import RunFolder, RunFolderError


def arc_file(folder: Path) -> Path:
    path = folder / "arc.jsonl"
    words = ["SELECT", "def", "ls", "return"]
    lines = []
    for i in range(12):
        choices = [
            {"text": f"{word} {i}", "label": label}
            for word, label in zip(words, "ABCD", strict=True)
        ]
        record = {
            "question": {"stem": f"What is {i}?", "choices": choices},
            "answerKey": "ABCD"[i % 4],
        }
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_a_population_has_the_scores_of_its_models_alone(family: Family, tmp_path: Path) -> None:
    from cycleqd_jax.merging.spectral import expert_gains, zero_gains
    from cycleqd_jax.runs.workspace import open_workspace

    config = RunConfig(
        base=str(family.base),
        experts={name: str(folder) for name, folder in family.experts.items()},
        tasks=tuple(family.experts),
    )
    workspace = open_workspace(config)
    genotypes = [zero_gains(workspace.layout)]
    genotypes += [expert_gains(workspace.layout, e) for e in range(3)]
    gains = jax.tree.map(lambda *leaves: np.stack(leaves), *genotypes)
    tasks = Tasks([arc_easy(arc_file(tmp_path))])
    together = [scores_of(r) for r in tasks.evaluate(population_of(workspace, gains))]
    folders = {"base": family.base, **family.experts}
    alone, traces = {}, []
    for name, model in each_model(folders):
        (result,) = tasks.evaluate(model)
        alone[name] = scores_of(result)
        traces.append(model.scorer.traces)
    # One model after the other in the same compiled program.
    assert traces == [1, 1, 1, 1]
    assert together == list(alone.values())
    metrics = together[0]["arc_easy_local"]
    assert set(metrics) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    console = Console(width=120, record=True, file=(tmp_path / "table.txt").open("w"))
    console.print(retention_table(alone))
    printed = console.export_text()
    assert f"{metrics['acc']:.3f} ±{metrics['acc_stderr']:.3f}" in printed
    console.file.close()


@pytest.mark.slow
def test_one_model_is_in_memory_at_a_time(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = []
    load = retention._load

    def count_and_load(*arguments: Any) -> Any:
        gc.collect()
        matrices.append(sum(leaf.ndim > 1 for leaf in jax.live_arrays()))
        return load(*arguments)

    monkeypatch.setattr(retention, "_load", count_and_load)
    for _, model in each_model({"base": family.base, **family.experts}):
        assert len(model.models) == 1
    assert matrices == [matrices[0]] * 4


def test_a_run_names_its_models(tmp_path: Path) -> None:
    with pytest.raises(
        RunFolderError, match=r"expected the folder of a run, found no config\.json"
    ):
        models_of_run(tmp_path)
    config = RunConfig(base="/b", experts={"sql": "/s", "code": "/c"}, tasks=("database", "coding"))
    with RunFolder.open(tmp_path, config.to_json()):
        pass
    with pytest.raises(ValueError, match=r"expected a finished run, found no .*best"):
        models_of_run(tmp_path)
    for name in ("best", "aggregate"):
        (tmp_path / name).mkdir()
    base, models = models_of_run(tmp_path)
    assert base == "/b"
    assert list(models) == [
        "base", "expert/sql", "expert/code", "cycleqd/best", "cycleqd/aggregate",
    ]  # fmt: skip


def test_no_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Tasks([])


@pytest.mark.slow
def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'no_such_task' is not .*local ones: gsm8k_local, arc"):
        Tasks(["no_such_task"])
