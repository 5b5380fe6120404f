"""Statements that mean harm: each is refused or fails its problem, within its limit."""

import gc
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cycleqd_jax.sandbox import Limits, Sandbox, open_sandbox
from cycleqd_jax.tasks.base import Request
from cycleqd_jax.tasks.dbbench.backend import Backend
from cycleqd_jax.tasks.dbbench.mysql import MySQLBackend
from cycleqd_jax.tasks.dbbench.prompt import write_answer, write_operation
from cycleqd_jax.tasks.dbbench.records import Record, Table
from cycleqd_jax.tasks.dbbench.sqlite import SQLiteBackend
from cycleqd_jax.tasks.dbbench.task import DBBenchTask
from cycleqd_jax.tasks.rollout import rollout

T = "`Team Players`"
ENDLESS = "WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM x) SELECT"
MANY = ", ".join(f"{T} t{i}" for i in range(16))

# Loops for ever, floods, sleeps: OutOfLimits or an error of the database.
GREEDY = {
    "endless": f"{ENDLESS} COUNT(*) FROM x",
    "endless rows": f"{ENDLESS} n FROM x",
    "endless insert": f"INSERT INTO {T} (Name) {ENDLESS} n FROM x",
    "product": f"SELECT COUNT(*) FROM {MANY}",
    "product inserted": f"INSERT INTO {T} SELECT t1.* FROM {MANY}",
    "product sorted": f"SELECT t1.Name FROM {MANY} ORDER BY t1.Name, t2.Name, t3.Name",
    "sleep": "SELECT SLEEP(1000)",
    "sleep unlimited": "SET STATEMENT max_statement_time=0 FOR SELECT SLEEP(1000)",
    "sleep in rows": f"SELECT Name, SLEEP(2) FROM {T}",
    "sleep in a change": f"UPDATE {T} SET Name = SLEEP(100)",
    "benchmark": "SELECT BENCHMARK(1000000000000, MD5('x'))",
    "huge text": "SELECT REPEAT('x', 4000000000)",
    "huge texts": f"SELECT {', '.join(['REPEAT(Name, 10000)'] * 200)} FROM {T}",
    "huge pad": "SELECT LPAD('x', 4000000000, 'y')",
    "blob": "SELECT HEX(ZEROBLOB(900000000)), HEX(RANDOMBLOB(900000000))",
    "printf": "SELECT PRINTF('%900000000d', 1)",
    "regular expression": "SELECT REPEAT('a', 100) REGEXP '(a|aa)+(a|aa)+(a|aa)+$b'",
    "pattern": f"SELECT REPEAT('a', 5000) LIKE '{'%a' * 500}b'",
    "deep brackets": "SELECT " + "(" * 3000 + "1" + ")" * 3000,
    "open brackets": "SELECT " + "(" * 5000,
    "deep signs": "SELECT " + "- " * 5000 + "1",
    "deep negations": "SELECT " + "NOT " * 4000 + "1",
    "deep cases": "SELECT " + "CASE WHEN 1 THEN " * 800 + "1" + " END" * 800,
    "deep selects": "SELECT " + "(SELECT " * 1000 + "1" + ")" * 1000,
    "long sum": "SELECT 1" + "+1" * 2000,
    "long union": "SELECT 1" + " UNION SELECT 1" * 1500,
    "long text": "SELECT '" + "x" * 3_000_000 + "'",
    "long list": f"SELECT Name FROM {T} WHERE Name IN ({','.join(['1'] * 9000)})",
    "comment": "SELECT 1 /*" + "/*" * 9000,
    "quotes": "SELECT " + "'" * 9999,
    "NUL": "SELECT 'a\0b'",
    "surrogate": "SELECT '\udc80'",
}  # fmt: skip

# Reaches for files, other databases, the server: all of these are refused.
FORBIDDEN = {
    "attach": "ATTACH DATABASE '{secret}' AS x",
    "vacuum into": "VACUUM INTO '{made}'",
    "pragma": "PRAGMA writable_schema = 1",
    "pragma function": "SELECT * FROM pragma_database_list",
    "extension": "SELECT LOAD_EXTENSION('{secret}')",
    "load data": f"LOAD DATA INFILE '{{secret}}' INTO TABLE {T}",
    "load local data": f"LOAD DATA LOCAL INFILE '{{secret}}' INTO TABLE {T}",
    "load file": "SELECT LOAD_FILE('{secret}')",
    "read file": "SELECT READFILE('{secret}')",
    "write file": "SELECT WRITEFILE('{made}', 'x')",
    "outfile": f"SELECT * FROM {T} INTO OUTFILE '{{made}}'",
    "dump file": "SELECT 'x' INTO DUMPFILE '{made}'",
    "shell": "\\! cat {secret}",
    "source": "source {secret}",
    "drop the server's database": "DROP DATABASE mysql",
    "drop the neighbour's": "DROP DATABASE {neighbour}",
    "read the neighbour": "SELECT * FROM `{neighbour}`.`Team Players`",
    "change the neighbour": "UPDATE `{neighbour}`.`Team Players` SET Name = 'gone'",
    "passwords": "SELECT * FROM mysql.user",
    "new user": "CREATE USER thief IDENTIFIED BY 'x'",
    "grant": "GRANT ALL ON *.* TO CURRENT_USER()",
    "shutdown": "SHUTDOWN",
    "setting": "SET GLOBAL max_connections = 1",
    "plugin": "INSTALL SONAME 'ha_connect'",
    "function": "CREATE FUNCTION sys_exec RETURNS INT SONAME 'lib.so'",
    "event": "CREATE EVENT e ON SCHEDULE EVERY 1 SECOND DO SELECT 1",
    "two statements": f"SELECT 1; DROP TABLE {T}",
    "copy": "COPY t FROM PROGRAM 'id'",
}


@pytest.fixture(scope="module")
def small() -> Iterator[Sandbox]:
    with open_sandbox(limits=Limits(seconds=1.0, memory_mb=256), workers=2) as opened:
        yield opened


@pytest.fixture(scope="module", params=["sqlite", "mysql"])
def strict(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param == "sqlite":
        yield SQLiteBackend()
        return
    backend = MySQLBackend(request.getfixturevalue("server"), seconds=1.0)
    yield backend
    backend.close()


def play(
    statements: dict[str, str], table: Table, backend: Backend, sandbox: Sandbox
) -> tuple[dict[str, float], dict[str, str]]:
    """Name → the score and the last thing that each attacker heard.

    Beside them a right agent, whose score is that of ``""``.
    """
    record = Record("t/0", 0, "other", "Who?", table, ("Bob",))
    task = DBBenchTask((record,), backend)
    attempts = [f"SELECT Name FROM {T} WHERE Club = 'oslo' LIMIT 1", *statements.values()]
    heard = dict.fromkeys(["", *statements], "")

    def policy(requests: Sequence[Request]) -> list[str]:
        said = []
        for request in requests:
            name = list(heard)[request.candidate]
            if len(request.messages) == 3:
                said.append(write_operation(attempts[request.candidate]))
            else:
                heard[name] = request.messages[-1].content
                said.append(write_answer(("Bob" if not name else heard[name],)))
        return said

    played = rollout([task], {task.name: task.every_problem()}, len(attempts), policy, sandbox)
    scores = played.solved[task.name][:, 0].tolist()
    return dict(zip(heard, scores, strict=True)), heard


def state() -> tuple[int, int, int]:
    """Open descriptors, resident bytes and children of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE"), len(children)


@pytest.mark.slow
def test_greedy_statements_fail_their_problem_and_no_other(
    strict: Backend, small: Sandbox, players: Table
) -> None:
    assert play({}, players, strict, small)[0] == {"": 1.0}
    descriptors, memory, children = state()
    started = time.monotonic()
    scores, heard = play(GREEDY, players, strict, small)
    assert time.monotonic() - started < 90
    assert scores == {name: float(not name) for name in scores}
    assert all(len(reply) <= 811 for reply in heard.values())
    assert play({}, players, strict, small)[0] == {"": 1.0}
    deadline = time.monotonic() + 20
    # A server's databases are dropped in the background.
    while (after := state())[0] > descriptors and time.monotonic() < deadline:
        time.sleep(0.05)
    assert after[0] <= descriptors
    assert after[1] < memory + (100 << 20)
    assert after[2] == children


def test_forbidden_statements_are_refused(
    strict: Backend, small: Sandbox, players: Table, tmp_path: Path
) -> None:
    secret, made = tmp_path / "secret", tmp_path / "made"
    secret.write_text("the secret")
    tmp_path.chmod(0o777)
    neighbour = "dbbench0123456789abcdef"
    if isinstance(strict, MySQLBackend):
        with strict.connect() as admin:
            admin.execute(f"CREATE DATABASE {neighbour}")
            admin.execute(f"CREATE TABLE {neighbour}.{T} (Name TEXT)")
            admin.execute(f"INSERT INTO {neighbour}.{T} VALUES ('the secret')")
    names = {"{secret}": str(secret), "{made}": str(made), "{neighbour}": neighbour}
    statements = {}
    for name, text in FORBIDDEN.items():
        for place, value in names.items():
            text = text.replace(place, value)  # noqa: PLW2901
        statements[name] = text
    scores, heard = play(statements, players, strict, small)
    assert scores == {name: float(not name) for name in scores}
    assert not made.exists()
    answered = {n: r for n, r in heard.items() if n and r[4:6] != " (" and r != "[(None,)]"}
    assert answered == {}
    assert not any("the secret" in reply for reply in heard.values())
    if isinstance(strict, MySQLBackend):
        with strict.connect() as admin:
            admin.execute(f"SELECT * FROM {neighbour}.{T}")
            assert admin.fetchall() == (("the secret",),)
            admin.execute(f"DROP DATABASE {neighbour}")
