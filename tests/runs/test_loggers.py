"""Scalars of a row, event files, Weights & Biases, and packages that are not there."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cycleqd_jax.runs.watching.loggers import check_loggers, open_loggers, scalars_of

ROW = {
    "generation": 3,
    "coverage": [0.25, 0.5],
    "best_mean": 0.75,
    "archive": [1],
    "seconds": {"model": 2.0, "add": 1},
    "device_memory": {"peak": 10},
}


def test_a_row_becomes_scalars_with_the_names_of_the_tasks() -> None:
    assert scalars_of(ROW, ["coding", "shell"]) == {
        "coverage/coding": 0.25,
        "coverage/shell": 0.5,
        "best_mean": 0.75,
        "seconds/model": 2.0,
        "seconds/add": 1.0,
        "device_memory/peak": 10.0,
    }


def _events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag → (step, value) in the order of the files."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:  # length (8), its checksum (4), record, its checksum (4)
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_event_files_hold_every_generation(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    (logger,) = open_loggers(["tensorboard"], tmp_path, {}, 0)
    logger.log(1, {"coverage/coding": 0.25})
    logger.log(2, {"coverage/coding": 0.5})
    logger.close()
    assert _events(tmp_path / "tensorboard") == {"coverage/coding": [(1, 0.25), (2, 0.5)]}


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named_with_the_way_to_get_it(
    name: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"--log {name}: .*pip install {package}"):
        check_loggers([name])


def test_a_resumed_run_is_the_same_run_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []
    metrics: list[str] = []
    ended: list[bool] = []
    run = SimpleNamespace(
        log=logged.append,
        finish=lambda: ended.append(True),
        define_metric=lambda name, step_metric=None: metrics.append(f"{name}/{step_metric}"),
    )

    def init(**settings: Any) -> SimpleNamespace:
        started.append(settings)
        return run

    fake = ModuleType("wandb")
    monkeypatch.setattr(fake, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for done in (0, 1):
        (logger,) = open_loggers(["wandb"], tmp_path, {"seed": 4}, done)
        logger.log(done + 1, {"best_mean": 0.5})
        logger.close()
    assert started[0]["id"] == started[1]["id"] == (tmp_path / "wandb-id").read_text()
    assert {settings["resume"] for settings in started} == {"allow"}
    assert started[0]["config"] == {"seed": 4}
    assert metrics[:2] == ["generation/None", "*/generation"]
    assert [row["generation"] for row in logged] == [1, 2]
    assert ended == [True, True]
