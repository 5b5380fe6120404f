"""The scripts' shared front: arguments and plain errors."""

import runpy
import sys
from pathlib import Path

import pytest

from cycleqd_jax.runs.console import main_guard, parse_experts, reproduce_command

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_experts_are_read_in_order() -> None:
    found = parse_experts(["shell=/a", "coding=/b=c"])
    assert list(found.items()) == [("shell", "/a"), ("coding", "/b=c")]


@pytest.mark.parametrize("argument", ["shell", "=dir", "shell="])
def test_an_expert_without_name_or_folder_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"expected NAME=DIR, found '{argument}'"):
        parse_experts([argument])


def test_an_expert_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' was given twice"):
        parse_experts(["a=x", "a=y"])


def test_the_option_that_was_wrong_is_named() -> None:
    with pytest.raises(ValueError, match=r"^--models: expected NAME=DIR"):
        parse_experts(["shell"], "--models")
    with pytest.raises(ValueError, match=r"^--models: the name"):
        parse_experts(["a=x", "a=y"], "--models")


def test_an_error_is_one_message_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, main_guard():
        raise ValueError("model[0]: expected 3, found 4")
    assert end.value.code == 2
    assert "model[0]: expected 3, found 4" in capsys.readouterr().err


def test_a_command_is_written_down_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evolve.py", "--db", "mysql://me:se:cret@host:3306", "a b"])
    assert reproduce_command() == "python evolve.py --db mysql://me:***@host:3306 'a b'"
    monkeypatch.setattr(sys, "argv", ["evolve.py", "--db=mysql://host:3306", "--out", "x@y"])
    assert reproduce_command() == "python evolve.py --db=mysql://host:3306 --out x@y"


def test_an_interrupted_script_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, main_guard():
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert "same command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "coding=/nowhere", "--tasks", "coding", "shell"], "at least two experts"),
        (["--experts", "a=/x", "b=/y", "--tasks", "coding", "chess"], "chess"),
        (["--experts", "a=/x", "b=/y", "--tasks", "coding", "shell"], "/nowhere"),
    ],
)
def test_evolve_refuses_bad_arguments_in_words(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = ["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", ["evolve.py", "--base", "/nowhere", *arguments, *folders])
    monkeypatch.setattr("cycleqd_jax.runs.compilation.cache_compilations", lambda folder: None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXPERIMENTS / "evolve.py"), run_name="__main__")
    assert end.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", "")
