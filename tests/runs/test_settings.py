"""Settings by name, and the files that give them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cycleqd_jax.qd.presets import DEFAULT, PAPER
from cycleqd_jax.runs.command import known_settings
from cycleqd_jax.runs.settings import convert, read_settings, settings_of

KNOWN = known_settings()


def _file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_a_file_is_read_in_the_types_of_the_settings(tmp_path: Path) -> None:
    text = """
        base: models/base
        experts: {shell: models/a, coding: models/b}
        tasks: [coding, shell]
        temperature: 1
        rank: null
        out: runs/x
        log: [tensorboard]
        preset: {name: paper, bins: 7, ranges: [[0, 1], [0, 0.5]]}
    """
    found = read_settings(_file(tmp_path, text), KNOWN)
    assert list(found["experts"].items()) == [("shell", "models/a"), ("coding", "models/b")]
    assert found["tasks"] == ("coding", "shell")
    assert repr(found["temperature"]) == "1.0"  # as the command line reads it: one config
    assert found["rank"] is None
    assert found["out"] == Path("runs/x")
    assert found["log"] == ("tensorboard",)
    preset = found["preset"]
    assert (preset.mutation, preset.bins) == (PAPER.mutation, 7)
    assert preset.ranges == ((0.0, 1.0), (0.0, 0.5))


def test_a_preset_by_name_takes_its_grid_from_the_experts(tmp_path: Path) -> None:
    found = read_settings(_file(tmp_path, "preset: reference"), KNOWN)
    assert found["preset"].formula == "reference"
    assert found["preset"].ranges is None


def test_choices_without_a_name_change_the_default(tmp_path: Path) -> None:
    found = read_settings(_file(tmp_path, "preset: {bins: 3}"), KNOWN)
    assert found["preset"].mutation == DEFAULT.mutation
    assert found["preset"].bins == 3


def test_everything_wrong_in_a_file_is_said_at_once(tmp_path: Path) -> None:
    text = "generatoins: 3\nseed: zero\npreset: {bin: 2}\nlog: [mlflow]\n"
    with pytest.raises(ValueError, match="generatoins") as caught:
        read_settings(_file(tmp_path, text), KNOWN)
    message = str(caught.value)
    assert "unknown setting 'generatoins'; the nearest is 'generations'" in message
    assert "seed: expected a whole number, found 'zero'" in message
    assert "preset: unknown setting 'bin'; the nearest is 'bins'" in message
    assert "log: expected one of tensorboard, wandb, found 'mlflow'" in message
    assert message.count("run.yaml") == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- base", "expected settings, `NAME: VALUE` a line, found list"),
        ("a: [", "expected YAML"),
        ("preset: fast", "preset: expected one of default, paper, reference, found 'fast'"),
        ("preset: {mutation: fast}", "mutation: expected one of child_svd"),
        ("experts: [a, b]", "expected NAME: FOLDER"),
        ("experts: {a: 3}", "expected NAME: FOLDER"),
        ("transcripts: 1", "transcripts: expected true or false, found 1"),
        ("generations: 2.5", "generations: expected a whole number, found 2.5"),
        ("generations: true", "generations: expected a whole number, found True"),
        ("rank: all", "rank: expected a whole number or null, found 'all'"),
        ("temperature: warm", "temperature: expected a number, found 'warm'"),
        ("tasks: coding", "tasks: expected a list, found 'coding'"),
        ("pictures-every: 3", "the nearest is 'pictures_every'"),
    ],
)
def test_a_bad_file_is_refused_in_words(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"run\.yaml") as caught:
        read_settings(_file(tmp_path, text), KNOWN)
    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--config .*none\.yaml: cannot be read"):
        read_settings(tmp_path / "none.yaml", KNOWN)


def test_json_is_a_file_of_settings_too(tmp_path: Path) -> None:
    experts = [{"name": "b", "folder": "x"}, {"name": "a", "folder": "y"}]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"experts": experts, "seed": 3}))
    assert read_settings(path, KNOWN) == {"experts": {"b": "x", "a": "y"}, "seed": 3}


@pytest.mark.parametrize(
    ("value", "kind"),
    [([0.5], tuple[float, float]), (True, float | int), ("a", Path | None), (3, str)],
)
def test_values_are_never_guessed(value: Any, kind: Any) -> None:
    if value == "a":
        assert convert(value, kind) == Path("a")
        return
    with pytest.raises(ValueError, match="expected"):
        convert(value, kind)


def test_every_setting_is_explained() -> None:
    assert len(KNOWN) > 25
    assert all(len(setting.help) > 5 for setting in KNOWN.values())


def test_a_field_that_nobody_explains_is_an_error() -> None:
    @dataclass
    class Odd:
        """Odd.

        Attributes:
            one: said.
        """

        one: int = 1
        two: int = 2

    with pytest.raises(ValueError, match=r"Odd\.two: expected a line under Attributes"):
        settings_of(Odd)
