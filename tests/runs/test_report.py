import io
import json
import math
import re

import pytest
from rich.console import Console

from cycleqd_jax.runs.records.files import write_json_atomic
from cycleqd_jax.runs.results.report import describe_gain, gain, results_table, summary, with_means

TASKS = ("coding", "shell")
MODELS = {
    "base": {"coding": 0.0, "shell": 0.2},
    "expert/coding": {"coding": 0.8, "shell": 0.1},
    "expert/shell": {"shell": 0.9, "coding": 0.1},
    "merge/uniform": {"coding": 0.5, "shell": 0.5},
    "cycleqd/best": {"coding": 0.75, "shell": 0.65},
    "cycleqd/aggregate": {"coding": 0.8, "shell": math.nan},
}


def printed(models, tasks=TASKS):
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=True, color_system="standard")
    console.print(results_table(models, tasks))
    return text.getvalue()


def test_means_are_added_in_task_order():
    rows = with_means(MODELS, TASKS)
    assert list(rows["expert/shell"].items()) == [("coding", 0.1), ("shell", 0.9), ("mean", 0.5)]
    assert math.isnan(rows["cycleqd/aggregate"]["mean"])


def test_a_missing_score_is_named():
    with pytest.raises(ValueError, match=r"base: expected scores for .* found none for \['web'\]"):
        with_means(MODELS, [*TASKS, "web"])


def test_the_gain_is_over_the_best_model_that_is_not_of_cycleqd():
    ahead = gain(MODELS, TASKS)
    assert ahead is not None
    assert ahead.other == "expert/shell"  # the first of those with the best mean
    assert ahead.value == pytest.approx(0.2)
    assert "0.700: +0.200 against the best other model (expert/shell, 0.500)" in describe_gain(
        ahead
    )
    worse = {**MODELS, "cycleqd/best": {"coding": 0.1, "shell": 0.1}}
    behind = gain(worse, TASKS)
    assert behind is not None
    assert "-0.400" in describe_gain(behind)


def test_there_is_no_gain_without_both_sides():
    assert gain({"base": MODELS["base"]}, TASKS) is None
    assert gain({"cycleqd/best": MODELS["cycleqd/best"]}, TASKS) is None
    assert "against" not in printed({"base": MODELS["base"]})


def test_the_table_has_every_row_and_the_best_of_each_column_in_bold():
    text = printed(MODELS)
    lines = [line for line in text.splitlines() if "│" in line]
    assert [re.sub(r"\x1b\[\d+m", "", line).split()[1] for line in lines] == list(MODELS)

    def bold(line):
        return [part.split("\x1b[0m")[0].strip() for part in line.split("\x1b[1m")[1:]]

    assert [bold(line) for line in lines] == [
        [],
        ["0.800"],
        ["0.900"],
        [],
        ["0.700"],
        ["0.800"],  # a tie: both are the best
    ]
    assert "–" in lines[-1]
    assert "+0.200 against the best other model" in text


def test_summary_has_the_documented_shape(tmp_path):
    content = summary(
        tasks=TASKS,
        split="test",
        models=MODELS,
        generations=3,
        evaluations=30,
        coverage=[0.1, 0.2],
        qd_score=[1, 2],
        seconds={"train": 1, "evolve": 2.5, "test": 0},
    )
    write_json_atomic(tmp_path / "summary.json", content)
    back = json.loads((tmp_path / "summary.json").read_text())
    assert list(back) == [
        "tasks",
        "split",
        "models",
        "generations",
        "evaluations",
        "coverage",
        "qd_score",
        "seconds",
    ]
    assert back["models"]["base"] == {"coding": 0.0, "shell": 0.2, "mean": 0.1}
    assert back["models"]["cycleqd/aggregate"]["mean"] == "NaN"
    assert back["seconds"] == {"train": 1.0, "evolve": 2.5, "test": 0.0}


def test_summary_wants_a_value_for_every_archive():
    with pytest.raises(ValueError, match=r"coverage: expected a value for each of .*, found 1"):
        summary(
            tasks=TASKS,
            split="test",
            models=MODELS,
            generations=0,
            evaluations=0,
            coverage=[0.1],
            qd_score=[1, 2],
            seconds={},
        )


def test_standard_errors_stand_beside_the_scores():
    errors = {name: {"coding": 0.03, "shell": 0.04} for name in MODELS}
    result = summary(
        tasks=TASKS,
        split="test",
        models=MODELS,
        generations=1,
        evaluations=1,
        coverage=[0, 0],
        qd_score=[0, 0],
        seconds={},
        standard_errors=errors,
    )
    assert result["standard_errors"]["base"] == pytest.approx(
        {"coding": 0.03, "shell": 0.04, "mean": 0.025}
    )
    text = io.StringIO()
    Console(file=text, width=100).print(
        results_table(MODELS, TASKS, errors=result["standard_errors"])
    )
    assert "0.750 ± 0.030" in text.getvalue()
    assert "0.700 ± 0.025" in text.getvalue()
