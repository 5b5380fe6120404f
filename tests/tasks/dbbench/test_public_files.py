"""The public files, played by an agent that knows the labels, on both kinds of database."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from cycleqd_jax.sandbox import Sandbox
from cycleqd_jax.tasks.base import Request
from cycleqd_jax.tasks.dbbench.backend import Backend
from cycleqd_jax.tasks.dbbench.records import read_records
from cycleqd_jax.tasks.dbbench.scoring import accuracies
from cycleqd_jax.tasks.dbbench.task import DBBenchTask
from cycleqd_jax.tasks.rollout import rollout

# Its hash is that of no reading of its gold statement.
UNSOLVABLE = "standard/225"


@pytest.mark.slow
def test_the_labels_are_right_and_nothing_else(
    public_files: Path, backend: Backend, sandbox: Sandbox
) -> None:
    records = tuple(read_records(public_files, irregular="skip"))
    task = DBBenchTask(records, backend)
    problems = task.every_problem()
    known = {problem.prompt: problem for problem in problems}

    def policy(requests: Sequence[Request]) -> list[str]:
        # The second candidate says the same and never touches the database.
        return [
            known[r.messages[2].content].answers[-1 if r.candidate else len(r.messages) // 2 - 1]
            for r in requests
        ]

    solved = rollout([task], {task.name: problems}, 2, policy, sandbox).solved[task.name]
    found = dict(zip((record.id for record in records), solved[0], strict=True))
    assert [record_id for record_id, score in found.items() if score != 1.0] == [UNSOLVABLE]
    idle = accuracies(records, solved[1].tolist())
    assert (idle["SELECT"], idle["INSERT"], idle["UPDATE"]) == (1.0, 0.0, 0.0)
