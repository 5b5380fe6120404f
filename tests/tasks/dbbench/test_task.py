"""The agent's episode, its problems and how a user names them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cycleqd_jax.sandbox import MemoSandbox, Sandbox
from cycleqd_jax.tasks.base import Request, Split
from cycleqd_jax.tasks.dbbench import prompt
from cycleqd_jax.tasks.dbbench.backend import Backend
from cycleqd_jax.tasks.dbbench.records import Record, Table
from cycleqd_jax.tasks.dbbench.scoring import table_hash
from cycleqd_jax.tasks.dbbench.sqlite import SQLiteBackend
from cycleqd_jax.tasks.dbbench.task import DBBenchTask, dbbench_from_environment, open_dbbench
from cycleqd_jax.tasks.registry import make_tasks
from cycleqd_jax.tasks.rollout import rollout

T = "`Team Players`"
Play = Callable[..., list[float]]
SPLITS: tuple[Split, ...] = ("search", "validation", "test")


@pytest.fixture
def asked(players: Table) -> Record:
    return Record("dev/0", 0, "other", "Who?\nThe table.", players, ("Bob",))


@pytest.fixture
def changed(players: Table) -> Record:
    rows = (*players.rows, ("Dan", "Bonn", "1"))
    digest = table_hash(Table(players.name, players.columns, rows))
    statement = f"INSERT INTO {T} VALUES ('Dan', 'Bonn', 1)"
    return Record("dev/1", 1, "INSERT", "Add Dan.\nThe table.", players, (statement,), digest)


@pytest.fixture
def play(backend: Backend, sandbox: Sandbox) -> Play:
    """``play(record, attempts)``: one score an attempt; an attempt is a text a turn."""

    def score(record: Record, attempts: Sequence[Sequence[str]], rounds: int = 5) -> list[float]:
        task = DBBenchTask((record,), backend, rounds)

        def policy(requests: Sequence[Request]) -> list[str]:
            return [attempts[r.candidate][len(r.messages) // 2 - 1] for r in requests]

        played = rollout([task], {task.name: task.every_problem()}, len(attempts), policy, sandbox)
        return played.solved[task.name][:, 0].tolist()

    return score


def operation(statement: str) -> str:
    return f"I look.\n{prompt.write_operation(statement)}\n"


LOOK = operation(f"SELECT Name FROM {T}")
ANSWER = prompt.write_answer(("Bob",))


def test_a_question_is_judged_by_the_answer(asked: Record, play: Play) -> None:
    attempts = {
        "right at once": ([ANSWER], 1.0),
        "right after a look": ([LOOK, ANSWER], 1.0),
        "right after an error": ([operation("SELECT nothing"), ANSWER], 1.0),
        "right after five looks": ([LOOK] * 5 + [ANSWER], 1.0),
        "a sixth look": ([LOOK] * 6, 0.0),
        "answer beside the sixth look": ([LOOK] * 5 + [LOOK + "\nFinal Answer: ['Bob']"], 1.0),
        "wrong": ([prompt.write_answer(("Ann",))], 0.0),
        "answer without its line": (["Final Answer: ['Bob']"], 0.0),
        "no action is named": (["So be it.\nFinal Answer: ['Bob']"], 1.0),
        "operation without a block": (["Action: Operation\n\nFinal Answer: ['Bob']"], 0.0),
        "nothing": ([""], 0.0),
        "the table is changed on the way": ([operation(f"DELETE FROM {T}"), ANSWER], 1.0),
    }
    found = play(asked, [turns for turns, _ in attempts.values()])
    assert dict(zip(attempts, found, strict=True)) == {
        n: right for n, (_, right) in attempts.items()
    }


def test_a_change_is_judged_by_the_table(changed: Record, play: Play) -> None:
    right = operation(changed.labels[0])
    attempts = {
        "gold": ([right, "Action: Answer\nFinal Answer: [1]"], 1.0),
        "no answer": ([right, "done"], 1.0),
        "in two steps": (
            [
                operation(f"INSERT INTO {T} (Name) VALUES ('Dan')"),
                operation(f"UPDATE {T} SET Club='Bonn', `No of goals`=1 WHERE Name='dan'"),
                ANSWER,
            ],
            1.0,
        ),
        "twice": ([right, right, ANSWER], 0.0),
        "nothing": ([ANSWER], 0.0),
        "table gone": ([operation(f"DROP TABLE {T}"), ANSWER], 0.0),
        "undone": ([right, operation(f"DELETE FROM {T} WHERE Name = 'Dan'"), ANSWER], 0.0),
    }
    found = play(changed, [turns for turns, _ in attempts.values()])
    assert dict(zip(attempts, found, strict=True)) == {
        n: right for n, (_, right) in attempts.items()
    }


def test_rounds_can_be_chosen(asked: Record, play: Play) -> None:
    assert play(asked, [[LOOK, LOOK, ANSWER], [LOOK, ANSWER]], rounds=1) == [0.0, 1.0]
    assert play(asked, [[LOOK, ANSWER], [ANSWER]], rounds=0) == [0.0, 1.0]


def test_the_agent_reads_the_whole_conversation(asked: Record, sandbox: Sandbox) -> None:
    task = DBBenchTask((asked,), SQLiteBackend())
    heard: list[Request] = []

    def policy(requests: Sequence[Request]) -> list[str]:
        heard.extend(requests)
        return [LOOK if len(heard) == 1 else ANSWER]

    rollout([task], {task.name: task.every_problem()}, 1, policy, sandbox)
    first, second = heard
    assert first.messages == prompt.opening(asked.question)
    assert second.messages[:3] == first.messages
    assert [m.role for m in second.messages[3:]] == ["assistant", "user"]
    reply = "[('Zoë Müller',), ('Bob',), ('ann',), ('Carl',), ('Øystein',)]"
    assert [m.content for m in second.messages[3:]] == [LOOK, reply]


def test_equal_statements_run_once(asked: Record, sandbox: Sandbox) -> None:
    task = DBBenchTask((asked,), SQLiteBackend())
    memo = MemoSandbox(sandbox)  # not closed: the sandbox is everybody's

    def policy(requests: Sequence[Request]) -> list[str]:
        return [ANSWER if len(r.messages) == 5 else LOOK for r in requests]

    rollout([task], {task.name: task.every_problem()}, 4, policy, memo)
    assert (memo.misses, memo.hits) == (1, 3)


def test_splits_are_disjoint_and_a_table_is_in_one_of_them(players: Table) -> None:
    # 40 tables; every second is asked about twice, under a name in another case.
    names = [f"Table {i}" for i in range(40)] + [f"TABLE {i}" for i in range(0, 40, 2)]
    records = tuple(
        Record(f"standard/{i}", i, "other", f"Q{i}", replace(players, name=name), ("x",))
        for i, name in enumerate(names)
    )
    task, less = (DBBenchTask(r, SQLiteBackend()) for r in (records, records[::2]))
    seen: dict[str, Split] = {}
    for split in SPLITS:
        size = _size(task, split)
        drawn = task.problems(split, size, seed=1)
        seen |= {problem.record.id: split for problem in drawn}
        assert task.problems(split, size, seed=1) == drawn
        assert len({p.prompt for p in drawn}) == size
        for problem in less.problems(split, _size(less, split)):
            assert seen[problem.record.id] == split
    assert len(seen) == 60
    of_table: dict[str, set[Split]] = {}
    for number, name in enumerate(names):
        of_table.setdefault(name.lower(), set()).add(seen[f"standard/{number}"])
    assert all(len(splits) == 1 for splits in of_table.values())
    assert task.problems("search", 5, seed=1) != task.problems("search", 5, seed=2)
    with pytest.raises(
        ValueError, match="expected 1 problems in split 'train' of dbbench, found 0"
    ):
        task.problems("train", 1)


def _size(task: DBBenchTask, split: Split) -> int:
    with pytest.raises(ValueError, match="ask for fewer") as error:
        task.problems(split, 10_000)
    return int(str(error.value).split("found ")[1].split()[0])


def test_a_demonstration_is_the_whole_ideal_conversation(changed: Record) -> None:
    (problem,) = DBBenchTask((changed,), SQLiteBackend()).every_problem()
    turns = problem.demonstration
    assert turns[:3] == prompt.opening(changed.question)
    assert [m.role for m in turns[3:]] == ["assistant", "user", "assistant"]
    assert prompt.find_statement(turns[3].content) == changed.labels[0]


def test_users_name_it_and_say_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "agentbench" / "dbbench"
    folder.mkdir(parents=True)
    record = {
        "description": "Who?",
        "add_description": "The table.",
        "label": ["x"],
        "type": ["other"],
        "table": {"table_name": "t", "table_info": {"columns": [{"name": "a"}], "rows": [["x"]]}},
    }
    (folder / "standard.jsonl").write_text("".join(json.dumps(record) + "\n" for _ in range(97)))
    (folder / "dev.jsonl").write_text("{}\n")
    monkeypatch.delenv("CYCLEQD_DATA", raising=False)
    with pytest.raises(ValueError, match="task dbbench: set CYCLEQD_DATA to a folder that holds"):
        dbbench_from_environment()
    monkeypatch.setenv("CYCLEQD_DATA", str(tmp_path))
    monkeypatch.delenv("CYCLEQD_DB", raising=False)
    with pytest.raises(ValueError, match=r"dev.jsonl:1: type: expected list, found nothing"):
        make_tasks(["dbbench", "shell"])
    loadable, paper, shell = make_tasks(["dbbench/loadable", "dbbench/paper", "shell"])
    assert [t.name for t in (loadable, paper, shell)] == [
        "dbbench/loadable", "dbbench/paper", "shell",
    ]  # fmt: skip
    assert isinstance(loadable, DBBenchTask)
    assert isinstance(paper, DBBenchTask)
    # The paper leaves out the 97th of the files.
    assert (len(loadable.records), len(paper.records)) == (97, 96)
    monkeypatch.setenv("CYCLEQD_DB", "mysql://root@127.0.0.1:1")
    with pytest.raises(ValueError, match=r"no MySQL server answers at 127.0.0.1:1 .*apt install"):
        make_tasks(["dbbench/paper", "shell"])
    with pytest.raises(ValueError, match="expected mysql://USER:PASSWORD@HOST:PORT, found 'sqlite"):
        open_dbbench(folder, choice="loadable", database="sqlite://x")
