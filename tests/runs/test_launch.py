"""From a command to a run."""

import os
from pathlib import Path

import pytest

from cycleqd_jax.runs.command import parse_command
from cycleqd_jax.runs.launch import launch
from cycleqd_jax.runs.preflight import NotReady


def test_tasks_find_the_files_that_the_command_line_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CYCLEQD_DATA", "/elsewhere")
    monkeypatch.delenv("CYCLEQD_DB", raising=False)
    line = "--base /b --experts a=/a b=/b2 --tasks dbbench/loadable shell --dry-run --data"
    with pytest.raises(NotReady, match=str(tmp_path / "agentbench" / "dbbench")):
        launch(parse_command([*line.split(), str(tmp_path)]))
    assert os.environ["CYCLEQD_DATA"] == str(tmp_path)
    assert "CYCLEQD_DB" not in os.environ
