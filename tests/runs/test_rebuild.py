"""Models of a finished run, bred again from its log alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cycleqd_jax.models.convert import load_model, save_model
from cycleqd_jax.runs import driver
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.evaluate import Evaluator
from cycleqd_jax.runs.rebuild import digests
from cycleqd_jax.runs.records.files import read_json, write_json_atomic
from cycleqd_jax.runs.records.jsonl import JsonlWriter, read_jsonl
from cycleqd_jax.runs.records.lineage import LineageError
from cycleqd_jax.runs.records.parents import ParentsError
from cycleqd_jax.runs.results.release import PastRun
from cycleqd_jax.runs.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(finished: Path) -> Workspace:
    return PastRun(finished).open()


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The run as it is handed on: config, log and parents, no checkpoint."""
    for name in ("config.json", "parents.json", "lineage.jsonl"):
        shutil.copy(finished / name, tmp_path / name)
    return tmp_path


def change(run: Path, id: int, edit: Any) -> None:
    rows = read_jsonl(run / "lineage.jsonl")
    edit(rows[id])
    (run / "lineage.jsonl").unlink()
    with JsonlWriter(run / "lineage.jsonl") as log:
        for row in rows:
            if row:
                log.write(row)


def test_every_model_of_a_run_comes_out_again(copy: Path, workspace: Workspace) -> None:
    run = PastRun(copy)
    everyone = [birth["id"] for birth in read_jsonl(copy / "lineage.jsonl")]
    assert len(everyone) == 3 + 4 * 4
    gains = run.rebuild(workspace, everyone)
    assert digests(gains) == [run.family.birth(id).digest for id in everyone]
    assert len(set(digests(gains))) == len(everyone)
    for ids in ([18], [7], [2], [9, 18, 2, 9]):  # in any order, one alone or several
        found = digests(run.rebuild(workspace, ids))
        assert found == [run.family.birth(id).digest for id in ids]


@pytest.mark.slow
def test_what_is_rebuilt_is_what_was_scored(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workspace: Workspace
) -> None:
    """Held against the genotypes themselves, of SLERP too, with a child that lost its score."""
    scored: list[Any] = []
    seen = np.random.default_rng(0)

    def population(self: Evaluator, gains: Any, problems: Any, *args: Any, **named: Any) -> Any:
        scored.append(jax.tree.map(np.asarray, gains))
        count = jax.tree.leaves(gains)[0].shape[0]
        solved = {name: seen.uniform(size=(count, 2)).astype(np.float32) for name in problems}
        if len(scored) == 3:
            solved["shell"][1] = np.nan
        return driver_rollout(solved)

    monkeypatch.setattr(Evaluator, "population", population)
    odd = replace(config, preset=replace(config.preset, crossover="slerp", schedule="child"))
    with monkeypatch.context() as patched:
        patched.setattr(driver, "choose_finals", stop)
        with pytest.raises(KeyboardInterrupt):
            driver.evolve(odd, tmp_path / "run")
    run = PastRun(tmp_path / "run")
    births = read_jsonl(tmp_path / "run" / "lineage.jsonl")
    assert np.isnan(births[3 + 4 + 1]["scores"]["shell"])
    mine = replace(workspace, config=run.config)
    gains = run.rebuild(mine, [birth["id"] for birth in births])
    every = jax.tree.map(lambda *parts: np.concatenate(parts), *scored)
    for ours, theirs in zip(jax.tree.leaves(gains), jax.tree.leaves(every), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert {"place", "keys", "expert"} == set(births[-1]["operator"])


def driver_rollout(solved: dict[str, np.ndarray]) -> Any:
    from cycleqd_jax.tasks.played import Rollout

    return Rollout(
        attempts={name: found[:, :, None] for name, found in solved.items()},
        seconds={"model": 0.0, "sandbox": 0.0},
        requests=0,
        late=dict.fromkeys(solved, 0),
        failed=dict.fromkeys(solved, 0),
    )


def stop(*args: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("id", "edit", "message"),
    [
        (7, lambda row: row["operator"]["keys"][1].reverse(), "model 7 of generation 2 does not"),
        (7, lambda row: row["operator"].pop("keys"), "child 7: expected two parents, an archive"),
        (7, lambda row: row.update(digest=""), "expected the digest none, found"),
        (3, lambda row: row.update(digest="x"), "model 3 of generation 1 does not come out"),
        (7, lambda row: row.update(generation=3), r"expected the ids 11 to 14 in .* 3, found 7"),
        (1, lambda row: row.clear(), r"begin with the experts coding, .*, found 2 first parents"),
        (7, lambda row: row.update(parents=[3, 99]), "names the parent 99, which is not in the"),
    ],
)
def test_a_damaged_log_is_refused_where_it_is_damaged(
    copy: Path, workspace: Workspace, id: int, edit: Any, message: str
) -> None:
    change(copy, 7, lambda row: row.update(parents=[3, 4]))
    change(copy, id, edit)
    with pytest.raises(LineageError, match=message):
        PastRun(copy).rebuild(workspace, [7])


def test_a_model_the_run_never_made_is_named(copy: Path, workspace: Workspace) -> None:
    with pytest.raises(ValueError, match="no model has the id 500; there are 19"):
        PastRun(copy).rebuild(workspace, [500])


def test_a_parent_that_was_trained_on_since_is_refused(
    copy: Path, config: RunConfig, tmp_path: Path
) -> None:
    architecture, params = load_model(config.base)
    moved = params.replace(embed=params.embed + 1e-3)
    save_model(tmp_path / "base", architecture, moved, like=config.base)
    settings = read_json(copy / "config.json")
    write_json_atomic(copy / "config.json", {**settings, "base": str(tmp_path / "base")})
    with pytest.raises(ParentsError, match=rf"base: {tmp_path}/base\n.*Restore them"):
        PastRun(copy).open()


def test_a_config_comes_back_as_it_was(finished: Path, config: RunConfig) -> None:
    back = PastRun(finished).config
    assert back == config
    assert list(back.experts) == list(config.experts)
    settings = json.loads((finished / "config.json").read_text())
    settings.pop("format")
    with pytest.raises(ValueError, match="found an unknown 'knots'"):
        RunConfig.from_json({**settings, "knots": 3})
    with pytest.raises(ValueError, match="found no 'seed'"):
        RunConfig.from_json({k: v for k, v in settings.items() if k != "seed"})
