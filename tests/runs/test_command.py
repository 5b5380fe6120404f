"""Command line over file over defaults; what is wrong is said and ends the process."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from cycleqd_jax.qd.presets import DEFAULT, PAPER, PRESETS
from cycleqd_jax.runs.command import known_settings, parse_command
from cycleqd_jax.runs.config import RunConfig
from cycleqd_jax.runs.records.folder import RunFolder, RunFolderError

NEEDED = ["--base", "/b", "--experts", "coding=/c", "shell=/s", "--tasks", "coding", "shell"]


def test_a_command_line_makes_the_tree() -> None:
    found = parse_command(
        [
            *(*NEEDED, "--preset", "paper", "--bins", "7", "--seed=3", "--rank", "8"),
            *("--temperature", "1", "--out", "x", "--transcripts", "--log", "wandb", "--profile"),
        ]
    )
    assert found.run == RunConfig(
        base="/b",
        experts={"coding": "/c", "shell": "/s"},
        tasks=("coding", "shell"),
        preset=dataclasses.replace(PAPER, bins=7),
        seed=3,
        rank=8,
        temperature=1.0,
    )
    assert repr(found.run.temperature) == "1.0"
    assert list(found.run.experts) == ["coding", "shell"]
    assert (found.out, found.transcripts, found.dry_run) == (Path("x"), True, False)
    assert (found.watch.log, found.watch.profile) == (("wandb",), True)


def test_the_commands_of_the_readme_are_read(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (file,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "run.yaml").write_text(file)
    lines = re.findall(r"python experiments/evolve\.py (.*)", readme.replace("\\\n", ""))
    assert len(lines) >= 5
    for line in lines:
        arguments = shlex.split(line.replace("run.yaml", str(tmp_path / "run.yaml")))
        # The README calls every expert NAME.
        found = [
            each.replace("NAME=", f"expert{i}=") if each.startswith("NAME=") else each
            for i, each in enumerate(arguments)
        ]
        assert len(parse_command(found).run.tasks) == 2


def test_without_flags_the_dataclasses_decide() -> None:
    found = parse_command(NEEDED)
    expected = RunConfig(
        base="/b", experts={"coding": "/c", "shell": "/s"}, tasks=("coding", "shell")
    )
    assert found.run == expected
    assert found.run.preset == DEFAULT


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_line_changes_single_choices_of_any_preset(name: str) -> None:
    found = parse_command([*NEEDED, "--preset", name, "--preset.mutation-strength", "0.7"])
    expected = dataclasses.replace(PRESETS[name], ranges=None, mutation_strength=0.7)
    assert found.run.preset == expected


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "base: /b\nexperts: {coding: /c, shell: /s}\ntasks: [coding, shell]\n"
        "children: 5\nseed: 5\npreset: {bins: 5, mutation: gaussian}\n"
    )
    found = parse_command(
        ["--config", str(file), "--seed", "6", "--bins", "6"],
        defaults={"seed": 4, "children": 4, "problems": 4},
    ).run
    assert (found.seed, found.children, found.problems) == (6, 5, 4)
    assert (found.preset.bins, found.preset.mutation) == (6, "gaussian")
    assert found.experts == {"coding": "/c", "shell": "/s"}
    whole = parse_command(["--config", str(file), "--preset", "paper"]).run
    assert whole.preset == PAPER  # a name takes the place of all of the file's choices


def test_config_json_gives_the_run_back(tmp_path: Path) -> None:
    first = parse_command([*NEEDED, "--preset", "reference", "--temperature", "1"]).run
    with RunFolder.open(tmp_path / "run", first.to_json()) as folder:
        file = folder.config_file
    assert parse_command(["--config", str(file)]).run == first
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 0}))
    with pytest.raises(RunFolderError, match="an older version"):
        parse_command(["--config", str(file)])


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_command(["--help"], description="Breed.")
    assert end.value.code == 0
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for name, setting in known_settings().items():
        assert f"--{name.replace('_', '-')}" in shown
        assert setting.help.split()[0] in shown
    for text in ("Breed.", "--preset.bins", "(default: 16)", "(required)", "in tokens", "seconds"):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*NEEDED, "--generatoins", "3"], "--generations"),
        ([*NEEDED, "--preset", "fast"], "fast"),
        ([*NEEDED, "--seed", "one"], "one"),
        (NEEDED[2:], "--base"),
        ([*NEEDED, "--log", "mlflow"], "mlflow"),
        ([*NEEDED, "--config"], "--config"),
    ],
)
def test_a_bad_command_line_ends_with_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_command(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--generations", "0"], "generations: expected at least 1, found 0"),
        (["--pictures-every", "-1"], "pictures_every: expected at least 0"),
        (["--log", "wandb", "wandb"], "each logger once"),
        (["--experts", "coding"], "expected NAME=DIR, found 'coding'"),
    ],
)
def test_values_out_of_range_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_command([*NEEDED, *arguments])
