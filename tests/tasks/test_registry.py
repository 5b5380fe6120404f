import re

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
