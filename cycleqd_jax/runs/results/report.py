"""The result of a run in numbers: the table on the terminal and ``summary.json``."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

BEST = "cycleqd/best"
_OURS = "cycleqd/"

Scores = Mapping[str, SupportsFloat]


@dataclass(frozen=True)
class Gain:
    """How far the best CycleQD model is ahead of every model not of CycleQD, in mean score."""

    value: float
    ours: float
    other: str
    other_mean: float


def with_means(models: Mapping[str, Scores], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Every model's scores in task order, with their ``mean`` added.

    Raises:
        ValueError: if a model lacks a task's score; the message names both.
    """
    completed = {}
    for name, scores in models.items():
        missing = [task for task in tasks if task not in scores]
        if missing:
            raise ValueError(f"{name}: expected scores for {list(tasks)}, found none for {missing}")
        row = {task: float(scores[task]) for task in tasks}
        completed[name] = {**row, "mean": math.fsum(row.values()) / len(row)}
    return completed


def gain(models: Mapping[str, Scores], tasks: Sequence[str]) -> Gain | None:
    """Mean of ``cycleqd/best`` minus that of the best other row (base, experts, merges).

    None if the table has no ``cycleqd/best`` or no other row.
    """
    means = {name: row["mean"] for name, row in with_means(models, tasks).items()}
    others = {n: m for n, m in means.items() if not n.startswith(_OURS) and math.isfinite(m)}
    if BEST not in means or not others:
        return None
    other = max(others, key=lambda name: others[name])
    return Gain(means[BEST] - others[other], means[BEST], other, others[other])


def results_table(
    models: Mapping[str, Scores],
    tasks: Sequence[str],
    title: str = "Scores on held-out problems",
    *,
    errors: Mapping[str, Scores] | None = None,
) -> RenderableType:
    """The result, to print with `rich`: a row a model, a column a skill and the mean.

    Args:
        models: name (``base``, ``expert/NAME``, ``merge/uniform``, ``cycleqd/best``, …) to scores
            per task, in the order of the rows; names with one prefix make a block.
        tasks: the skills, in the order of the columns.
        title: what is printed above.
        errors: the standard errors of the scores, printed after a ±; None prints none.

    The best values of a column are bold. Below stands the gain of ``cycleqd/best`` over the best
    other row.
    """
    rows = with_means(models, tasks)
    columns = [*tasks, "mean"]
    best = {
        c: max((r[c] for r in rows.values() if math.isfinite(r[c])), default=math.nan)
        for c in columns
    }
    table = Table(title=title, title_style="bold", title_justify="left")
    table.add_column("model", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    names = list(rows)
    for i, name in enumerate(names):
        last_of_block = i + 1 < len(names) and _block(names[i + 1]) != _block(name)
        noise = {} if errors is None else errors[name]
        cells = [_cell(rows[name][c], rows[name][c] == best[c], noise.get(c)) for c in columns]
        style = "green" if name.startswith(_OURS) else ""
        table.add_row(Text(name, style=style), *cells, end_section=last_of_block)
    ahead = gain(models, tasks)
    return table if ahead is None else Group(table, Text(describe_gain(ahead)))


def describe_gain(ahead: Gain) -> str:
    """The gain in one sentence."""
    return (
        f"{BEST} has a mean of {ahead.ours:.3f}: {ahead.value:+.3f} against the best other model "
        f"({ahead.other}, {ahead.other_mean:.3f})"
    )


def summary(
    *,
    tasks: Sequence[str],
    split: str,
    models: Mapping[str, Scores],
    generations: int,
    evaluations: int,
    coverage: Iterable[SupportsFloat],
    qd_score: Iterable[SupportsFloat],
    seconds: Mapping[str, SupportsFloat],
    standard_errors: Mapping[str, Scores] | None = None,
) -> dict[str, Any]:
    """The content of ``summary.json``; write it with `records.files.write_json_atomic`.

    Args:
        tasks: K task names.
        split: the split the models were scored on.
        models: name to scores per task; means are added.
        generations: generations evolved.
        evaluations: models scored during evolution.
        coverage: share of filled cells of each archive, (K,), in [0, 1].
        qd_score: sum of qualities of each archive, (K,).
        seconds: wall time of the phases (``train``, ``evolve``, ``test``).
        standard_errors: of the models' scores, where problems were attempted more than once.
    """
    archives = {"coverage": _floats(coverage), "qd_score": _floats(qd_score)}
    for name, values in archives.items():
        if len(values) != len(tasks):
            raise ValueError(
                f"{name}: expected a value for each of {list(tasks)}, found {len(values)}"
            )
    noise = {} if standard_errors is None else {"standard_errors": _errors(standard_errors, tasks)}
    return {
        "tasks": list(tasks),
        "split": split,
        "models": with_means(models, tasks),
        **noise,
        "generations": int(generations),
        "evaluations": int(evaluations),
        **archives,
        "seconds": {phase: float(s) for phase, s in seconds.items()},
    }


def _errors(models: Mapping[str, Scores], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Every model's standard errors, with that of its ``mean``; the tasks' are independent."""
    rows = {name: {task: float(row[task]) for task in tasks} for name, row in models.items()}
    return {n: {**r, "mean": math.hypot(*r.values()) / len(r)} for n, r in rows.items()}


def _floats(values: Iterable[SupportsFloat]) -> list[float]:
    return [float(value) for value in values]


def _block(name: str) -> str:
    return name.partition("/")[0]


def _cell(value: float, is_best: bool, error: SupportsFloat | None) -> Text:
    shown = f"{value:.3f}" if math.isfinite(value) else "–"
    if error is not None:
        shown += f" ± {float(error):.3f}"
    return Text(shown, style="bold" if is_best else "")
