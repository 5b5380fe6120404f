"""Models and teams exported from a finished run, by the command a user types."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from cycleqd_jax.models.convert import load_model
from cycleqd_jax.models.tokenizer import load_tokenizer
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.records.files import read_json, write_json_atomic
from cycleqd_jax.runs.records.folder import RunFolderError
from cycleqd_jax.runs.results.release import PastRun, release
from cycleqd_jax.runs.results.team import TeamError, load_team


def same(a, b) -> bool:
    return bool(jax.tree.all(jax.tree.map(np.array_equal, a, b)))


@pytest.mark.parametrize("which", ["best", "aggregate"])
def test_what_the_run_put_forward_is_exported_again(
    finished: Path, tmp_path: Path, which: str
) -> None:
    release(PastRun(finished), which, tmp_path / "out", command="python -m cycleqd_jax.export …")
    (_, theirs), (_, ours) = load_model(finished / which), load_model(tmp_path / "out")
    assert same(theirs, ours)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| validation | 2 |" in card
    assert "| test | 2 |" in card
    assert ("| search | 2 |" in card) == (which == "best")
    assert "python -m cycleqd_jax.export …" in card
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.chat_template
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_any_child_is_exported_with_what_was_measured_of_it(finished: Path, tmp_path: Path) -> None:
    finals = read_json(finished / "finals.json")
    (child, *_) = [id for id in range(3, 19) if str(id) not in finals["finalists"]]
    release(PastRun(finished), str(child), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"#{child} of generation" in card
    assert "| search | 2 |" in card
    assert "| validation" not in card
    assert "| test" not in card


def test_finals_say_who_was_chosen_and_on_what(finished: Path, config: RunConfig) -> None:
    finals = read_json(finished / "finals.json")
    assert finals["split"] == "validation"
    assert str(finals["best"]["id"]) in finals["finalists"]
    assert len(finals["aggregate"]["ids"]) == len(config.tasks)
    assert set(finals["team"]) == {"ids", "gains", "covered", "problems", "optimal"}


@pytest.mark.slow
def test_a_team_is_small_and_loads_back(finished: Path, config: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "parents.json", "lineage.jsonl", "finals.json"):
        (run / name).write_bytes((finished / name).read_bytes())
    with pytest.raises(ValueError, match="no team: no finalist solved a problem"):
        release(PastRun(run), "team", tmp_path / "team")  # the tiny models solve nothing
    finals = read_json(run / "finals.json")
    finals["team"] |= {"ids": [9, 4], "gains": [3, 1], "covered": 4, "problems": 6}
    write_json_atomic(run / "finals.json", finals)
    release(PastRun(run), "team", tmp_path / "team")
    team = load_team(tmp_path / "team")
    assert team.members == ("child-9", "child-4")
    for id in (9, 4):
        release(PastRun(run), str(id), tmp_path / f"child-{id}")
        assert same(team.model(f"child-{id}"), load_model(tmp_path / f"child-{id}")[1])
        size = (tmp_path / "team" / "members" / f"child-{id}.safetensors").stat().st_size
        assert size < (tmp_path / f"child-{id}" / "model.safetensors").stat().st_size / 10
    assert same(load_model(tmp_path / "team" / "base")[1], load_model(config.base)[1])
    assert jax.tree.leaves(team.population())
    assert "4 of 6 validation problems" in (tmp_path / "team" / "README.md").read_text()
    with pytest.raises(ValueError, match="expected one of child-9, child-4, found 'x'"):
        team.model("x")

    for file in ("members/child-4.safetensors", "basis.safetensors"):
        path = tmp_path / "team" / file
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(TeamError, match=rf"{file}: .*expected the (digest|checksum)|damaged"):
            load_team(tmp_path / "team")
        path.write_bytes(whole)
    with pytest.raises(TeamError, match=r"found no team\.json"):
        load_team(tmp_path)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("best-ish", "--id: expected a number, best, aggregate or team, found 'best-ish'"),
        ("77", "no model has the id 77"),
    ],
)
def test_a_wrong_id_is_named_before_anything_is_loaded(
    finished: Path, tmp_path: Path, which: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        release(PastRun(finished), which, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_and_an_unfinished_run_are_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="expected a new or an empty folder"):
        release(PastRun(finished), "best", tmp_path / "out")
    for name in ("config.json", "lineage.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    with pytest.raises(ValueError, match="has not chosen its final models yet: start its command"):
        release(PastRun(tmp_path), "best", tmp_path / "new")
    with pytest.raises(RunFolderError, match=r"found no config\.json"):
        PastRun(tmp_path / "out")


@pytest.mark.slow
def test_the_commands_print_a_tree_and_write_a_model(finished: Path, tmp_path: Path) -> None:
    def typed(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *words, "--cache", str(tmp_path / "cache")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    shown = typed("cycleqd_jax.lineage", str(finished), "18")
    assert shown.returncode == 0, shown.stderr
    assert "#18 generation 4, archive coding" in shown.stdout
    assert "rebuilt bit for bit from" in shown.stdout
    written = typed("cycleqd_jax.export", str(finished), "--id", "18", "--out", str(tmp_path / "x"))
    assert written.returncode == 0, written.stderr
    assert json.loads((tmp_path / "x" / "config.json").read_text())["model_type"] == "llama"
    wrong = typed("cycleqd_jax.lineage", str(finished), "99")
    assert wrong.returncode == 2
    assert "error: lineage: no model has the id 99" in wrong.stderr
