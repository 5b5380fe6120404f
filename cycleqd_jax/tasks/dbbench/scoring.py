"""AgentBench v0.2's judgement of answers and tables, without its `eval`."""

import ast
import hashlib
import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from cycleqd_jax.tasks.dbbench.records import Record, Table

_MAX_LITERAL = 20_000  # characters


def read_answer(text: str) -> list[object]:
    """The answers in the text after "Final Answer:".

    A Python literal that can be listed gives its members (a string's are its characters, as in the
    original), everything else the text itself, spaces included.
    """
    if len(text) > _MAX_LITERAL:
        return [text]
    try:
        with warnings.catch_warnings():
            # A stray backslash in a string is the agent's business.
            warnings.simplefilter("ignore")
            return list(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return [text]


def same_answer(text: str, labels: Sequence[str]) -> bool:
    """Whether the text after "Final Answer:" is right.

    One answer and one label are compared as numbers, else as they are; otherwise both are sets.
    A number in a list of several is no string and so no label.
    """
    answers = read_answer(text)
    if len(answers) == 1 and len(labels) == 1:
        try:
            return float(answers[0]) == float(labels[0])  # type: ignore[arg-type]
        except (ValueError, TypeError, OverflowError):
            return answers[0] == labels[0]
    try:
        return set(answers) == set(labels)
    except TypeError:
        return False  # an answer is a list or another thing that no set can hold


def table_hash(table: Table) -> str:
    """The hash by which a changed table is judged.

    MD5 of the rows' hashes, sorted and joined by commas; a row's is the first five digits of the
    MD5 of its cells, joined by commas without the NULLs.
    """
    rows = sorted(
        hashlib.md5(",".join(c for c in row if c is not None).encode()).hexdigest()[:5]
        for row in table.rows
    )
    return write_hash(hashlib.md5(",".join(rows).encode()).hexdigest() if rows else None)


def write_hash(digest: str | None) -> str:
    """A hash the way Python shows the one row and column that MySQL returns."""
    return str([(digest,)])


def accuracies(records: Sequence[Record], solved: Iterable[float]) -> dict[str, float]:
    """The benchmark's own table for one agent.

    Args:
        records: the problems that were played.
        solved: the score of each.

    Returns:
        The accuracy of every kind that occurs, of ``SELECT`` (all kinds but changes), ``overall``,
        AgentBench's mean of the accuracies on SELECT, INSERT and UPDATE (those that occur), and
        ``pooled``, CycleQD's share of solved problems.
    """
    scores = np.asarray(list(solved), np.float64)
    kinds = np.asarray([record.kind for record in records])
    table = {kind: float(scores[kinds == kind].mean()) for kind in dict.fromkeys(kinds.tolist())}
    asked = np.asarray([not record.changes for record in records], bool)
    if asked.any():
        table["SELECT"] = float(scores[asked].mean())
    groups = [table[name] for name in ("SELECT", "INSERT", "UPDATE") if name in table]
    return {**table, "overall": float(np.mean(groups)), "pooled": float(scores.mean())}
