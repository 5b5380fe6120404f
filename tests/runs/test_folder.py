import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest

from cycleqd_jax.runs.records import folder as folder_module
from cycleqd_jax.runs.records.folder import RunFolder, RunFolderError, differing_keys, read_config

CONFIG = {"seed": 0, "grid": {"bins": 15, "low": 0.85}, "tasks": ("coding", "shell")}


def test_a_new_folder_gets_a_sorted_config_and_is_not_a_resumed_run(tmp_path):
    path = tmp_path / "runs" / "a"
    with RunFolder.open(path, CONFIG) as run:
        assert not run.resumed
        assert run.config == {**CONFIG, "tasks": ["coding", "shell"]}
        assert list(json.loads(run.config_file.read_text())) == ["format", "grid", "seed", "tasks"]
        assert {p.name for p in (run.metrics_file, run.lineage_file, run.summary_file)} == {
            "metrics.jsonl",
            "lineage.jsonl",
            "summary.json",
        }
        assert run.archives_picture == path / "archives.png"
        assert run.curves_picture == path / "curves.png"
        assert [p.parent for p in (run.checkpoints, run.best, run.aggregate)] == [path] * 3


def test_the_same_config_resumes_and_keeps_the_files(tmp_path):
    with RunFolder.open(tmp_path / "a", CONFIG) as run:
        run.metrics_file.write_text("{}\n")
    with RunFolder.open(tmp_path / "a", dict(reversed(CONFIG.items()))) as run:
        assert run.resumed
        assert run.metrics_file.read_text() == "{}\n"


def test_another_config_is_refused_with_every_differing_key(tmp_path):
    RunFolder.open(tmp_path / "a", CONFIG).close()
    before = (tmp_path / "a" / "config.json").read_bytes()
    other = {"seed": 1, "grid": {"low": 0.85}, "tasks": ["coding", "shell"], "model": "tiny"}
    with pytest.raises(RunFolderError) as caught:
        RunFolder.open(tmp_path / "a", other)
    message = str(caught.value)
    assert "grid.bins: expected nothing, found 15" in message
    assert "model: expected 'tiny', found nothing" in message
    assert "seed: expected 1, found 0" in message
    assert "tasks" not in message
    assert "Name another folder" in message
    assert (tmp_path / "a" / "config.json").read_bytes() == before
    RunFolder.open(tmp_path / "a", CONFIG).close()  # the refusal gave the lock back


def test_differing_keys_tells_kinds_apart_and_equates_nan():
    nan = float("nan")
    assert differing_keys({"a": nan, "b": {}}, {"a": nan, "b": {}}) == []
    assert differing_keys({"a": 1, "b": {}}, {"a": True, "b": {"c": 1}}) == [
        "a: expected True, found 1",
        "b: expected nothing, found {}",
        "b.c: expected 1, found nothing",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "a run of an older version of cycleqd_jax: expected the format 2, found 1"),
        ({"format": 3}, "a run of a newer version of cycleqd_jax: expected the format 2, found 3"),
    ],
)
def test_a_run_of_another_version_is_refused_and_left_as_it_was(tmp_path, change, message):
    config = json.dumps({"seed": 0, **change})
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(RunFolderError, match=message):
        RunFolder.open(tmp_path, {"seed": 0})
    with pytest.raises(RunFolderError, match=message):
        read_config(tmp_path)
    assert (tmp_path / "config.json").read_text() == config


def test_the_config_is_read_without_the_lock(tmp_path):
    with RunFolder.open(tmp_path, CONFIG):
        assert read_config(tmp_path) == {**CONFIG, "tasks": ["coding", "shell"]}
    with pytest.raises(
        RunFolderError, match=r"expected the folder of a run, found no config\.json"
    ):
        read_config(tmp_path / "elsewhere")


def test_drafts_of_a_killed_process_are_cleared_and_nothing_else(tmp_path):
    RunFolder.open(tmp_path, CONFIG).close()
    for draft in (".best.x1", ".best.x1.old", ".aggregate.ab"):
        (tmp_path / draft).mkdir()
        (tmp_path / draft / "model.safetensors").touch()
    (tmp_path / ".summary.json.77.tmp").touch()
    (tmp_path / "best").mkdir()
    (tmp_path / ".notes").mkdir()
    with RunFolder.open(tmp_path, CONFIG):
        assert set(os.listdir(tmp_path)) == {".lock", ".notes", "best", "config.json"}


def test_objects_in_a_list_are_told_apart_setting_by_setting():
    found = {"experts": [{"folder": "a", "name": "x"}, {"name": "y", "folder": "b"}]}
    wanted = {"experts": [{"name": "x", "folder": "a"}, {"name": "y", "folder": "c"}]}
    assert differing_keys(found, wanted) == ["experts[1].folder: expected 'c', found 'b'"]
    swapped = {"experts": found["experts"][::-1]}
    assert len(differing_keys(found, swapped)) == 4  # the order of the experts matters


def test_a_file_is_refused(tmp_path):
    (tmp_path / "a").write_text("precious")
    with pytest.raises(RunFolderError, match="expected a folder for the run, found a file"):
        RunFolder.open(tmp_path / "a", CONFIG)
    with pytest.raises(RunFolderError, match="a parent of it is a file"):
        RunFolder.open(tmp_path / "a" / "b", CONFIG)
    assert (tmp_path / "a").read_text() == "precious"


def test_a_folder_of_other_things_is_refused_and_left_as_it_was(tmp_path):
    for name in ("thesis.tex", "photo.jpg"):
        (tmp_path / name).write_text(name)
    with pytest.raises(RunFolderError, match=r"found photo\.jpg, thesis\.tex; nothing was changed"):
        RunFolder.open(tmp_path, CONFIG)
    assert sorted(os.listdir(tmp_path)) == ["photo.jpg", "thesis.tex"]


def test_what_a_run_killed_before_its_config_left_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.123.tmp").write_text("{")
    with RunFolder.open(tmp_path, CONFIG) as run:
        assert not run.resumed


def test_a_damaged_config_is_named(tmp_path):
    RunFolder.open(tmp_path, CONFIG).close()
    (tmp_path / "config.json").write_text('{"seed"')
    with pytest.raises(RunFolderError, match=r"config\.json: expected JSON.*restore the file"):
        RunFolder.open(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EACCES, "cannot write there"),
        (errno.EROFS, "read-only"),
        (errno.ENOSPC, "no space left"),
    ],
)
def test_a_folder_one_cannot_write_to_says_so(tmp_path, monkeypatch, code, message):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder_module.os, "open", refuse)
    with pytest.raises((RunFolderError, OSError), match=message):
        RunFolder.open(tmp_path / "a", CONFIG)


def test_two_runs_on_one_folder_the_second_is_refused(tmp_path):
    with (
        RunFolder.open(tmp_path, CONFIG),
        pytest.raises(RunFolderError, match=rf"in use by process {os.getpid()} on"),
    ):
        RunFolder.open(tmp_path, CONFIG)
    RunFolder.open(tmp_path, CONFIG).close()


def test_the_lock_holds_against_another_process_and_ends_with_a_kill(tmp_path):
    program = """
        import fcntl, os, sys, time
        lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("locked", flush=True)
        time.sleep(60)
    """
    RunFolder.open(tmp_path, CONFIG).close()
    with subprocess.Popen(
        [sys.executable, "-S", "-c", textwrap.dedent(program), str(tmp_path / ".lock")],
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunFolderError, match="in use"):
            RunFolder.open(tmp_path, CONFIG)
        other.kill()
        other.wait()
        RunFolder.open(tmp_path, CONFIG).close()
