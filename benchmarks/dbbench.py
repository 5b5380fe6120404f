"""DBBench's gold statements on SQLite in the sandbox and on a MySQL server, against their hashes.

    python benchmarks/dbbench.py --data DIR [--db mysql://… | --db private] [--json FILE]

DIR holds standard.jsonl and dev.jsonl. An agent that knows the labels plays every problem that
MySQL can load: changes by their gold statement, questions by a look at the whole table and the
labels. "private" starts a MariaDB server on loopback for the time of the run.
"""

import argparse
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from measuring import Row, row, write_rows

from cycleqd_jax.sandbox import open_sandbox
from cycleqd_jax.tasks.base import Request
from cycleqd_jax.tasks.dbbench import prompt
from cycleqd_jax.tasks.dbbench.backend import Backend
from cycleqd_jax.tasks.dbbench.mysql import MySQLBackend
from cycleqd_jax.tasks.dbbench.records import Record, read_records
from cycleqd_jax.tasks.dbbench.scoring import accuracies
from cycleqd_jax.tasks.dbbench.server import private_server
from cycleqd_jax.tasks.dbbench.sqlite import SQLiteBackend
from cycleqd_jax.tasks.dbbench.task import DBBenchTask
from cycleqd_jax.tasks.rollout import rollout

GOLD_BAR, SECONDS_BAR = 239, 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--db", metavar="URL", help="a server, or 'private'; default: SQLite only")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    records = read_records(options.data, irregular="skip")
    rows: list[Row] = []
    failed: dict[str, list[str]] = {}
    with _backends(options.db) as backends:
        for name, backend in backends.items():
            scores, seconds = replay(records, backend, options.workers)
            failed[name] = [r.id for r, s in zip(records, scores, strict=True) if s != 1.0]
            changes = [s for r, s in zip(records, scores, strict=True) if r.changes]
            table = accuracies(records, scores)
            print(
                f"{name}: gold statements {sum(changes):.0f} of {len(changes)} (bar {GOLD_BAR}), "
                f"SELECT {table['SELECT']:.3f}, {len(records)} problems in {seconds:.1f} s, "
                f"not solved: {', '.join(failed[name]) or 'none'}"
            )
            held = partial(against_bar, name)
            rows += [
                held("gold statements that give the hash", sum(changes), GOLD_BAR, "of 240"),
                held("questions answered by their labels", table["SELECT"], 1.0, "share"),
            ]
            if name == "sqlite":
                rate, bar = len(records) / seconds, 360 / SECONDS_BAR
                rows.append(held("problems replayed", rate, bar, "problems/s"))
    if len(failed) == 2:
        one, other = failed.values()
        differ = sorted(set(one) ^ set(other))
        print(f"the backends differ on: {', '.join(differ) or 'no problem'}")
    write_rows(options.json, rows)


def against_bar(backend: str, title: str, ours: float, bar: float, unit: str) -> Row:
    return row(f"{backend}: {title}", ours, bar, "bar", unit, more_is_better=True)


def replay(records: Sequence[Record], backend: Backend, workers: int) -> tuple[list[float], float]:
    """Scores of the agent that knows the labels, and the time it took."""
    task = DBBenchTask(tuple(records), backend)
    problems = task.every_problem()
    known = {problem.prompt: problem for problem in problems}

    def policy(requests: Sequence[Request]) -> list[str]:
        said = []
        for request in requests:
            problem = known[request.messages[2].content]
            if len(request.messages) > 3 or problem.record.changes:
                said.append(problem.answers[len(request.messages) > 3 and problem.record.changes])
            else:
                name = problem.record.table.name.replace("`", "``")
                said.append(prompt.write_operation(f"SELECT * FROM `{name}`"))
        return said

    with open_sandbox(workers=workers) as sandbox:
        started = time.perf_counter()
        played = rollout([task], {task.name: problems}, 1, policy, sandbox)
        seconds = time.perf_counter() - started
    return played.solved[task.name][0].tolist(), seconds


@contextlib.contextmanager
def _backends(url: str | None) -> Iterator[dict[str, Backend]]:
    with contextlib.ExitStack() as stack:
        backends: dict[str, Backend] = {"sqlite": SQLiteBackend()}
        if url:
            address = stack.enter_context(private_server()) if url == "private" else url
            server = MySQLBackend(address)
            stack.callback(server.close)
            backends["mysql"] = server
        yield backends


if __name__ == "__main__":
    main()
