import re
import sys
from pathlib import Path

import pytest

from cycleqd_jax.tasks.registry import BENCHMARKS, TASKS, make_tasks


def test_tasks_come_in_the_order_of_their_names() -> None:
    names = ["shell", "coding", "database"]
    assert [task.name for task in make_tasks(names)] == names


def test_every_task_carries_the_name_it_is_registered_under() -> None:
    assert {name: make().name for name, make in TASKS.items()} == {name: name for name in TASKS}


def test_unknown_names_are_all_listed_beside_the_known_ones() -> None:
    known = re.escape(", ".join([*TASKS, *BENCHMARKS]))
    message = f"expected task names among {known}, found 'poetry', 'chess'"
    with pytest.raises(ValueError, match=message):
        make_tasks(["coding", "poetry", "chess"])


def test_a_repeated_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected each task once, found coding, shell, coding"):
        make_tasks(["coding", "shell", "coding"])


@pytest.mark.parametrize("names", [[], ["shell"]])
def test_fewer_than_two_tasks_is_an_error(names: list[str]) -> None:
    with pytest.raises(ValueError, match=f"at least two tasks .*, found {len(names)}"):
        make_tasks(names)


def test_the_registry_cannot_be_changed() -> None:
    for table in (TASKS, BENCHMARKS):
        with pytest.raises(TypeError, match="item assignment"):
            table["poetry"] = TASKS["coding"]  # type: ignore[index]


def test_no_benchmark_takes_the_name_of_a_generated_task() -> None:
    assert not TASKS.keys() & BENCHMARKS.keys()


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_what_is_wrong_with_an_imported_task_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from cycleqd_jax.tasks.coding import CodingTask as Mine\nclass Empty: ...\n"
    write_module(tmp_path, monkeypatch, "own_tasks_for_a_test", text)
    for name, message in {
        "no_such_module:Task": "importable from .*No module named 'no_such_module'",
        "own_tasks_for_a_test:Other": "has no attribute 'Other'",
        "own_tasks_for_a_test:Empty": r"expected something with a name.*found Empty",
        "own_tasks_for_a_test:Mine": r"different names, found 'coding' \(own_.*'coding' \(coding",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_tasks([name, "coding"])
    assert make_tasks(["own_tasks_for_a_test:Mine", "shell"])[0].name == "coding"
