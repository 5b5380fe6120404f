"""What is particular to a server: nothing is left there, and what cannot be had is said."""

import sys
from collections.abc import Callable, Sequence

import pytest

from cycleqd_jax.sandbox import Sandbox
from cycleqd_jax.tasks.base import Call, Request
from cycleqd_jax.tasks.dbbench import mysql
from cycleqd_jax.tasks.dbbench.errors import OutOfLimits
from cycleqd_jax.tasks.dbbench.mysql import MySQLBackend, ServerGone
from cycleqd_jax.tasks.dbbench.prompt import write_operation
from cycleqd_jax.tasks.dbbench.records import Record, Table
from cycleqd_jax.tasks.dbbench.task import DBBenchTask
from cycleqd_jax.tasks.rollout import rollout

Finish = Callable[..., str]


def leftovers(backend: MySQLBackend) -> list[str]:
    """Databases, users and connections that were made for sessions."""
    found = []
    with backend.connect() as admin:
        for query in (
            "SELECT schema_name FROM information_schema.schemata",
            "SELECT user FROM mysql.user",
            "SELECT user FROM information_schema.processlist",
        ):
            admin.execute(query)
            found += [row[0] for row in admin.fetchall() if row[0].startswith("dbbench")]
    return found


def test_every_end_of_an_episode_leaves_nothing(
    server: str, players: Table, sandbox: Sandbox
) -> None:
    backend = MySQLBackend(server, seconds=0.5)
    before = leftovers(backend)
    record = Record("dev/0", 0, "other", "Who?", players, ("Bob",))
    task = DBBenchTask((record,), backend)
    turns = ["SELECT 1", "SELECT SLEEP(60)", "DROP TABLE `Team Players`", "DO SLEEP(60)"]

    def policy(requests: Sequence[Request]) -> list[str]:
        return [write_operation(turns[r.candidate]) for r in requests]

    played = rollout([task], {task.name: task.every_problem()}, len(turns), policy, sandbox)
    assert played.scores.tolist() == [[0.0]] * len(turns)
    # One that is given up between two turns.
    episode = task.episode(task.every_problem()[0])
    next(episode)
    step = episode.send(write_operation("SELECT 1"))
    assert isinstance(step, Call)
    episode.send(step.function())
    assert len(leftovers(backend)) > len(before)
    episode.close()
    backend.close()
    assert leftovers(backend) == before


def test_sessions_of_one_table_are_apart(
    mysql: MySQLBackend, players: Table, finish: Finish
) -> None:
    one, other = mysql.session(players), mysql.session(players)
    finish(one.execute("DELETE FROM `Team Players`"))
    assert finish(one.execute("SELECT COUNT(*) FROM `Team Players`")) == "[(0,)]"
    assert finish(other.execute("SELECT COUNT(*) FROM `Team Players`")) == "[(5,)]"
    for session in (one, other):
        session.close()
        session.close()


def test_the_names_of_user_and_database_stay_hidden(
    mysql: MySQLBackend, players: Table, finish: Finish
) -> None:
    session = mysql.session(players)
    assert finish(session.execute("SELECT DATABASE()")) == "[('Team Players',)]"
    for statement in ("SHOW GRANTS", "SHOW DATABASES", "SELECT * FROM mysql.user", "CREATE USER a"):
        assert "dbbench" not in finish(session.execute(statement))
    session.close()


def test_names_may_hold_any_character(mysql: MySQLBackend, finish: Finish) -> None:
    table = Table("50% `a/b` (c)", ("100%s", "x`y"), (("1", "%s"), ("2", None)))
    session = mysql.session(table)
    reply = finish(session.execute("SELECT * FROM `50% ``a/b`` (c)` WHERE `x``y` LIKE '\\%%'"))
    assert reply == "[('1', '%s')]"
    session.close()


def test_a_session_whose_account_is_gone_fails_its_problem(
    mysql: MySQLBackend, players: Table, finish: Finish
) -> None:
    session = mysql.session(players)
    finish(session.execute("SET PASSWORD = PASSWORD('another')"))
    with pytest.raises(OutOfLimits, match=r"no connection: .*Access denied"):
        finish(session.execute("SELECT 1"))
    session.close()


def test_a_missing_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymysql", None)
    with pytest.raises(ImportError, match="needs pymysql: pip install 'cycleqd-jax"):
        MySQLBackend("mysql://root@127.0.0.1:1")


def test_a_missing_server_says_how_to_start_one() -> None:
    with pytest.raises(ValueError, match=r"no MySQL server answers at 127.0.0.1:1 .*apt install"):
        MySQLBackend("mysql://root@127.0.0.1:1")


def test_a_server_that_is_gone_ends_the_run_and_is_no_reply(
    server: str, players: Table, finish: Finish
) -> None:
    backend = MySQLBackend(server)
    session = backend.session(players)
    finish(session.execute("SELECT 1"))
    address, backend._address = backend._address, {"host": "127.0.0.1", "port": 1}
    with pytest.raises(ServerGone, match=r"no MySQL server answers at 127.0.0.1:1"):
        finish(session.execute("SELECT 1"))
    backend._address = address
    session.close()
    backend.close()


def test_a_database_that_is_still_held_is_dropped_later(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("pymysql")
    held = iter([driver.err.OperationalError(1205, "lock"), driver.err.OperationalError(2013, "")])
    dropped: list[str] = []
    pauses: list[float] = []

    def drop(self: MySQLBackend, name: str) -> None:
        if (error := next(held, None)) is not None:
            raise error
        dropped.append(name)

    monkeypatch.setattr(MySQLBackend, "_drop", drop)
    monkeypatch.setattr(mysql.time, "sleep", pauses.append)
    MySQLBackend.__new__(MySQLBackend)._drop_at_last("dbbench0")
    assert (dropped, len(pauses)) == (["dbbench0"], 2)
