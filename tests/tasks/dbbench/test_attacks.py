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
from cycleqd_jax.tasks.dbbench.scoring import table_hash
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

GOLD = f"UPDATE {T} SET Club = 'Rome' WHERE Name = 'Bob'"

# Attacks that take several turns, or that leave something for the next: the table is judged after.
SEQUENCES: dict[str, tuple[str, ...]] = {
    "view instead": (f"DROP TABLE {T}", f"CREATE VIEW {T} AS SELECT 'Bob' AS Name, 'Rome' AS Club"),
    "view beside": (f"CREATE VIEW v AS SELECT * FROM {T}", f"DROP TABLE {T}", "SELECT * FROM v"),
    "views in a circle": ("CREATE VIEW a AS SELECT 1 AS x", "CREATE VIEW b AS SELECT * FROM a",
                          "DROP VIEW a", "CREATE VIEW a AS SELECT * FROM b", "SELECT * FROM a"),
    "temporary table": (f"CREATE TEMPORARY TABLE {T} (Name TEXT, Club TEXT)", f"DELETE FROM {T}"),
    "temporary view": (f"CREATE TEMPORARY VIEW {T} AS SELECT 1", f"SELECT * FROM {T}"),
    "query that shadows": (f"WITH {T} AS (SELECT 'Rome' AS Club) SELECT * FROM {T}",
                           f"CREATE TABLE x AS WITH {T} AS (SELECT 1) SELECT * FROM {T}"),
    "renamed": (f"ALTER TABLE {T} RENAME TO x", f"CREATE TABLE {T} (Name TEXT)"),
    "columns gone": (f"ALTER TABLE {T} DROP COLUMN Club", f"ALTER TABLE {T} ADD COLUMN Club INT"),
    "trigger": (f"CREATE TRIGGER x BEFORE UPDATE ON {T} FOR EACH ROW SET NEW.Club = 'Rome'",
                f"UPDATE {T} SET Name = Name"),
    "trigger that loops": (f"CREATE TRIGGER x AFTER INSERT ON {T} BEGIN INSERT INTO {T} VALUES "
                           "(1, 2, 3); END", f"INSERT INTO {T} VALUES (1, 2, 3)"),
    "procedure": ("CREATE PROCEDURE p() BEGIN LOOP DO SLEEP(9); END LOOP; END", "CALL p()"),
    "procedure of the server": ("CALL sys.execute_prepared_stmt('SHUTDOWN')",),
    "function": ("CREATE FUNCTION MD5(x TEXT) RETURNS TEXT RETURN 'x'", "SELECT MD5('a')"),
    "event": (f"CREATE EVENT e ON SCHEDULE EVERY 1 SECOND DO DELETE FROM {T}",),
    "transaction left open": ("START TRANSACTION", f"DELETE FROM {T}"),
    "transaction taken back": ("SET autocommit = 0", GOLD, "ROLLBACK", f"DELETE FROM {T} LIMIT 1"),
    "distributed transaction": ("XA START 'x'", f"DELETE FROM {T}", "XA END 'x'", "XA PREPARE 'x'"),
    # MariaDB's programs without a procedure. A prepared transaction would keep its locks for ever.
    "prepared transaction": (f"BEGIN NOT ATOMIC XA START 'x'; DELETE FROM {T}; XA END 'x'; "
                             "XA PREPARE 'x'; END",),
    "program": ("BEGIN NOT ATOMIC WHILE 1 DO DO SLEEP(1); END WHILE; END",),
    "deaf program": ("BEGIN NOT ATOMIC DECLARE CONTINUE HANDLER FOR SQLEXCEPTION BEGIN END; "
                     "LOOP DO SLEEP(1); END LOOP; END",),
    "program that makes tables": (
        "BEGIN NOT ATOMIC DECLARE i INT DEFAULT 0; LOOP SET i = i + 1; EXECUTE IMMEDIATE "
        "CONCAT('CREATE TABLE t', i, ' (a INT)'); END LOOP; END",),
    "program behind comments": ("/**/BEGIN-- x\n/* */NOT # y\nATOMIC DO SLEEP(60); END",
                                "/*!99999 SELECT 1 */ BEGIN NOT ATOMIC DO SLEEP(60); END",
                                "/*M! BEGIN NOT */ ATOMIC DO SLEEP(60); END"),
    "program with a name": ("x: LOOP DO SLEEP(9); END LOOP", "`x`: WHILE 1 DO DO 1; END WHILE"),
    "program without a beginning": ("WHILE 1 DO DO SLEEP(1); END WHILE",
                                    "IF 1 THEN DO SLEEP(60); END IF",
                                    "REPEAT DO SLEEP(1); UNTIL 0 END REPEAT",
                                    "FOR i IN 1..999 DO DO SLEEP(1); END FOR"),
    "program in a text": ("EXECUTE IMMEDIATE 'BEGIN NOT ATOMIC DO SLEEP(60); END'",
                          "SET STATEMENT max_statement_time = 0 FOR EXECUTE IMMEDIATE 'DO 1'"),
    "prepared": (f"PREPARE s FROM 'DROP TABLE {T}'", "EXECUTE s", "DEALLOCATE PREPARE s"),
    "locks": ("SELECT GET_LOCK('x', 1000)", "SELECT IS_USED_LOCK('x')", f"LOCK TABLES {T} WRITE",
              "FLUSH TABLES WITH READ LOCK", "SELECT RELEASE_ALL_LOCKS()"),
    "row locks": (f"SELECT * FROM {T} FOR UPDATE", f"SELECT * FROM {T} LOCK IN SHARE MODE"),
    "kill itself": ("KILL CONNECTION_ID()", "SELECT 1", "KILL USER CURRENT_USER()"),
    "kill others": ("KILL 1", "KILL USER admin", "KILL QUERY 5", "KILL HARD CONNECTION 6"),
    "behind comments": ("SELECT 1 /*! INTO OUTFILE '/tmp/dbbench-attack' */", "/*!SHUTDOWN*/",
                        "/*M!100000 SHUTDOWN */", f"SELECT 1 -- x\n; DROP TABLE {T}",
                        f"SELECT 1 # x\n; DROP TABLE {T}"),
    "two and more": (f"SELECT 1; DROP TABLE {T}", f"SELECT 1;; DELETE FROM {T};", "; ;SHUTDOWN"),
    "quotes that end": ("SELECT '\\'; DROP TABLE x; -- '",
                        f"SELECT `a``; DROP TABLE {T}; -- ` FROM x"),
    "its database": ("DROP DATABASE `Team Players`", "CREATE DATABASE `Team Players`", "USE mysql",
                     "DROP SCHEMA IF EXISTS `Team Players`"),
    "its password": ("SET PASSWORD = PASSWORD('x')", "SELECT 1"),
    "rights": ("GRANT ALL ON *.* TO CURRENT_USER", "SET ROLE admin", "SET DEFAULT ROLE admin",
               "REVOKE ALL ON *.* FROM admin", "ALTER USER admin IDENTIFIED BY 'x'"),
    "settings of all": ("SET GLOBAL max_statement_time = 1", "SET PERSIST max_connections = 1",
                        "SET @@global.general_log_file = '/tmp/x'", "FLUSH PRIVILEGES",
                        "RESET MASTER"),
    "settings of its own": ("SET max_statement_time = 0", "SET SESSION sql_log_bin = 0",
                            "SET max_session_mem_used = 18446744073709551615", "SELECT SLEEP(0)"),
    "settings as rows": ("SELECT @@datadir, @@hostname, @@basedir", "SHOW VARIABLES LIKE '%dir%'",
                         "SHOW GRANTS", "SHOW PROCESSLIST", "SHOW MASTER STATUS"),
    "catalogues": ("SELECT * FROM information_schema.user_privileges", "SELECT * FROM mysql.db",
                   "SELECT * FROM performance_schema.threads", "SELECT * FROM sys.processlist",
                   "SELECT user, info FROM information_schema.processlist WHERE user = 'admin'"),
    "catalogue of SQLite": ("UPDATE sqlite_master SET sql = 'x'", "SELECT * FROM sqlite_schema",
                            "SELECT * FROM sqlite_temp_master", "CREATE TABLE sqlite_x (a TEXT)",
                            "SELECT * FROM `main`.sqlite_master"),
    "functions of SQLite": ("SELECT FTS3_TOKENIZER('x', 'y')", "SELECT EDIT('x', 'sh')",
                            "SELECT SQLITE_LOG(1, 'x'), LOAD_EXTENSION('x', 'y')",
                            "SELECT * FROM dbstat", "SELECT * FROM pragma_table_list"),
    "tables of modules": ("CREATE VIRTUAL TABLE x USING fts5(a)",
                          "CREATE VIRTUAL TABLE y USING csv(z)",
                          "CREATE TABLE e (a INT) ENGINE = CSV",
                          "CREATE TABLE m (a INT) ENGINE = MEMORY",
                          "CREATE TABLE c (a INT) ENGINE = CONNECT FILE_NAME = '/etc/passwd'"),
    "tables elsewhere": ("CREATE TABLE x (a INT) DATA DIRECTORY = '/tmp'",
                         "CREATE TABLE mysql.x (a INT)",
                         f"RENAME TABLE {T} TO mysql.x", f"ALTER TABLE {T} DISCARD TABLESPACE",
                         "CREATE TABLESPACE x ADD DATAFILE '/tmp/x.ibd'"),
    "settings of SQLite": ("PRAGMA journal_mode = WAL", "PRAGMA temp_store_directory = '/tmp'",
                           "PRAGMA max_page_count = 4294967294", "REINDEX", "ANALYZE"),
    "files by name": ("DETACH main", "BACKUP TO '/tmp/x'", ".shell id", "\\! id",
                      "VACUUM main INTO '/tmp/x'"),
    "deep documents": ("SELECT JSON_EXTRACT(REPEAT('[', 100000), '$')",
                       "SELECT EXTRACTVALUE(REPEAT('<a>', 100000), '/a')",
                       "SELECT JSON_VALID(REPEAT('{\"a\":', 50000))"),
    "long chains": ("SELECT " + "9 / " * 2400 + "1", "SELECT " + "9 DIV " * 2400 + "1",
                    "SELECT " + "1 XOR " * 2400 + "1", "SELECT " + "'a' || " * 2400 + "'b'",
                    f"SELECT * FROM {T}" + f" JOIN {T}" * 40),
}  # fmt: skip

# The same with what takes its time.
SLOW_SEQUENCES: dict[str, tuple[str, ...]] = {
    "wide row": (f"SELECT {', '.join(['x'] * 60)} FROM (SELECT REPEAT('x', 4000000) AS x) AS y",),
    "wide row of columns": (f"INSERT INTO {T} (Name) VALUES (REPEAT('x', 900000))",
                            f"SELECT {', '.join(['Name'] * 900)} FROM {T} WHERE Club IS NULL"),
    "long statement": ("SELECT '" + "x" * 20_000_000 + "'", "SELECT 1"),
    "endless sequence": ("SELECT COUNT(*) FROM seq_1_to_1000000000000",),
    "filled table": (f"INSERT INTO {T} SELECT REPEAT('x', 999999), Club, '' FROM {T}",
                     *[f"INSERT INTO {T} SELECT a.* FROM {T} a, {T} b, {T} c"] * 4),
    "filled by blobs": (f"INSERT INTO {T} (Name) SELECT HEX(ZEROBLOB(400000)) FROM {MANY}",
                        f"INSERT INTO {T} (Name) SELECT HEX(RANDOM_BYTES(1024)) FROM {MANY}"),
    "tables of copies": tuple(f"CREATE TABLE x{i} AS SELECT t1.* FROM {MANY}" for i in range(5)),
    "sorted": (f"SELECT DISTINCT CONCAT(RAND(), REPEAT('x', 9999)) AS r FROM {MANY} ORDER BY r",),
    "grouped": (f"SELECT GROUP_CONCAT(REPEAT(t1.Name, 9999) SEPARATOR 'xxxx') FROM {MANY}",),
    "variables": ("SET @a = REPEAT('x', 16000000), @b = CONCAT(@a), @c = CONCAT(@a), "
                  "@d = CONCAT(@a), @e = CONCAT(@a), @f = CONCAT(@a), @g = CONCAT(@a)",),
    "powers of rows": tuple(f"INSERT INTO {T} SELECT a.* FROM {T} a, {T} b" for _ in range(5)),
    "index of long texts": (f"INSERT INTO {T} (Name) VALUES (REPEAT('x', 900000))",
                            f"CREATE INDEX i ON {T} (Name(700))", f"CREATE INDEX j ON {T} (Club)"),
}  # fmt: skip


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
    question = Record("t/0", 0, "other", "Who?", table, ("Bob",))
    right = f"SELECT Name FROM {T} WHERE Club = 'oslo' LIMIT 1"
    turns = {name: (statement,) for name, statement in statements.items()}
    return play_turns({"": (right,), **turns}, question, backend, sandbox)


def play_turns(
    turns: dict[str, tuple[str, ...]], record: Record, backend: Backend, sandbox: Sandbox
) -> tuple[dict[str, float], dict[str, str]]:
    """The same for agents of several statements each."""
    task = DBBenchTask((record,), backend)
    attempts = list(turns.values())
    heard = dict.fromkeys(turns, "")

    def policy(requests: Sequence[Request]) -> list[str]:
        said = []
        for request in requests:
            name = list(heard)[request.candidate]
            # The opening has three messages, every statement and its reply two more.
            turn = (len(request.messages) - 3) // 2
            if turn < len(attempts[request.candidate]):
                said.append(write_operation(attempts[request.candidate][turn]))
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
    deadline = time.monotonic() + 60
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


@pytest.mark.slow
@pytest.mark.parametrize("attacks", [SEQUENCES, SLOW_SEQUENCES])
def test_sequences_leave_the_right_agents_their_tables(
    attacks: dict[str, tuple[str, ...]],
    strict: Backend,
    small: Sandbox,
    players: Table,
) -> None:
    rows = tuple((n, "Rome" if n == "Bob" else c, g) for n, c, g in players.rows)
    md5 = table_hash(Table(players.name, players.columns, rows))
    record = Record("t/0", 0, "UPDATE", "Bob?", players, (GOLD,), md5)
    before, server = state(), state_of_server(strict)
    # The right agent comes first and last, and once more when all is over.
    turns = {"": (GOLD,), **attacks, "last": (GOLD,)}
    started = time.monotonic()
    scores, heard = play_turns(turns, record, strict, small)
    assert time.monotonic() - started < 60
    assert scores == {name: float(name in ("", "last")) for name in turns}, heard
    assert all(len(reply) <= 811 for reply in heard.values())
    assert play_turns({"": (GOLD,)}, record, strict, small)[0] == {"": 1.0}
    assert state_of_server(strict) == server
    after = state()
    assert after[0] <= before[0]
    assert after[1] < before[1] + (150 << 20)
    assert after[2] == before[2]


def state_of_server(backend: Backend) -> dict[str, object]:
    """What a server must have the same of before and after; SQLite has none."""
    if not isinstance(backend, MySQLBackend):
        return {}
    found: dict[str, object] = {}
    with backend.connect() as admin:
        deadline = time.monotonic() + 20
        # Sessions are cleared away in the background.
        while admin.execute("SELECT 1 FROM mysql.user WHERE user LIKE 'dbbench%'"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for name, query in {
            "databases": "SHOW DATABASES",
            "users": "SELECT user, host, authentication_string FROM mysql.user",
            "settings": "SHOW GLOBAL VARIABLES WHERE variable_name NOT LIKE '%timestamp%'",
            "prepared transactions": "XA RECOVER",
            "connections": "SELECT user FROM information_schema.processlist",
            "events": "SELECT event_schema, event_name FROM information_schema.events",
            "routines": "SELECT COUNT(*) FROM information_schema.routines",
        }.items():
            admin.execute(query)
            found[name] = sorted(admin.fetchall())
    return found
