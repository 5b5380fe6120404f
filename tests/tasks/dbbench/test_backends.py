"""Statements that agents write, on both kinds of database: the same replies."""

import ast
from collections.abc import Callable

import pytest

from cycleqd_jax.tasks.dbbench import scoring
from cycleqd_jax.tasks.dbbench.backend import Session
from cycleqd_jax.tasks.dbbench.mysql import MySQLBackend
from cycleqd_jax.tasks.dbbench.records import Table
from cycleqd_jax.tasks.dbbench.sqlite import SQLiteBackend

Execute = Callable[[str], str]
Finish = Callable[..., str]

T = "`Team Players`"

QUESTIONS = [
    # Text equals text without case and accents, in a list, a pattern and a group too.
    (f"SELECT Name FROM {T} WHERE name = 'zoe muller'", [("Zoë Müller",)]),
    (f"SELECT Name FROM {T} WHERE Club IN ('OSLO', 'x') ORDER BY Name", [("ann",), ("Bob",)]),
    (f"SELECT Name FROM {T} WHERE Club NOT IN ('oslo')", [("Zoë Müller",), ("Øystein",)]),
    (f"SELECT Name FROM {T} WHERE Club LIKE 'k_l%'", [("Zoë Müller",)]),
    (f"SELECT Name FROM {T} WHERE Club LIKE '%\\_%'", []),
    (f"SELECT COUNT(*), MIN(Club) FROM {T} WHERE Club = 'Oslo' GROUP BY Club", [(2, "oslo")]),
    (f"SELECT COUNT(DISTINCT Club) FROM {T}", [(3,)]),
    (f"SELECT Name FROM {T} WHERE `No of goals` REGEXP '^[0-9]$'", [("Zoë Müller",)]),
    # The order of words, not of bytes.
    (f"SELECT Name FROM {T} ORDER BY Name",
     [("ann",), ("Bob",), ("Carl",), ("Øystein",), ("Zoë Müller",)]),
    # Text beside a number is a number, as far as it is one.
    (f"SELECT Name FROM {T} WHERE `No of goals` > 9", [("Bob",)]),
    (f"SELECT Name FROM {T} WHERE `No of goals` > '9'", []),
    (f"SELECT Name FROM {T} WHERE `No of goals` BETWEEN 1 AND 3", [("Carl",), ("Øystein",)]),
    (f"SELECT Name FROM {T} ORDER BY `No of goals` + 0 DESC LIMIT 1", [("Bob",)]),
    (f"SELECT Name FROM {T} ORDER BY CAST(`No of goals` AS SIGNED) DESC LIMIT 1, 1",
     [("Zoë Müller",)]),
    (f"SELECT SUM(`No of goals`), AVG(`No of goals`) FROM {T}", [(22.5, 4.5)]),
    (f"SELECT MAX(`No of goals`) FROM {T} WHERE Club = 'oslo'", [("10",)]),
    ("SELECT \"it's\", 'a\\'b', 'x' = 'X', NULL = 1, 7 DIV 2, 7 % 4",
     [("it's", "a'b", 1, None, 3, 3)]),
    ("SELECT 1 = '1x', 'abc' = 0", [(1, 1)]),
    (f"SELECT CONCAT(Name, '/', Club) FROM {T} WHERE Name IN ('Bob', 'Carl')",
     [("Bob/oslo",), (None,)]),
    ("SELECT CONCAT_WS('-', 'a', NULL, 'b'), SUBSTRING_INDEX('a,b,c', ',', 2), LEFT('abc', 2), "
     "RIGHT('abc', 2), LPAD('7', 3, '0'), REVERSE('abc'), REPEAT('ab', 2)",
     [("a-b", "a,b", "ab", "bc", "007", "cba", "abab")]),
    ("SELECT FIELD('b', 'a', 'B'), FIND_IN_SET('b', 'a,b'), LOCATE('b', 'abc'), YEAR('2012-03-04')",
     [(2, 2, 2, 2012)]),
    (f"SELECT GROUP_CONCAT(Name ORDER BY Name DESC SEPARATOR '; ') FROM {T} WHERE Club = 'oslo'",
     [("Bob; ann",)]),
    (f"SELECT IF(Club IS NULL, 'none', Club) AS c FROM {T} HAVING c = 'none'", [("none",)]),
    (f"SELECT t.Name FROM {T} t JOIN (SELECT 'BERN' AS c) x ON t.Club = x.c", [("Øystein",)]),
    (f"SELECT Name FROM {T} UNION SELECT 'bob' ORDER BY 1 LIMIT 1", [("ann",)]),
    ("WITH x AS (SELECT 2 AS n) SELECT n FROM x", [(2,)]),
    ("SHOW TABLES", [("Team Players",)]),
    (f"DESCRIBE {T}", [(n, "text", "YES", "", None, "") for n in ("Name", "Club", "No of goals")]),
    (f"SELECT Name FROM {T} WHERE Name = 'nobody';", []),
    ("SELECT MD5(''), MD5(0), MD5(NULL)",
     [("d41d8cd98f00b204e9800998ecf8427e", "cfcd208495d565ef66e7dff9f98764da", None)]),
]  # fmt: skip


@pytest.mark.parametrize(("statement", "rows"), QUESTIONS)
def test_a_question_is_answered_as_mysql_does(
    statement: str, rows: list[tuple[object, ...]], execute: Execute
) -> None:
    assert ast.literal_eval(execute(statement)) == rows


CHANGES = [
    f"INSERT INTO {T} VALUES ('Dan', NULL, 7)",
    f"INSERT INTO {T} (`No of goals`, Name) VALUES (1.50, 'Dan'), (-.5, 'Eve'), (007, \"F'\")",
    f"INSERT INTO {T} SET Name = 'Dan', `No of goals` = 1 + 1",
    f"REPLACE INTO {T} (Name) VALUES ('Dan')",
    f"UPDATE {T} SET Club = 'Rome' WHERE Name = 'OYSTEIN'",
    f"UPDATE {T} SET `No of goals` = `No of goals` + 0.1 WHERE `No of goals` >= 9",
    f"UPDATE {T} t SET t.Club = CONCAT(t.Club, ' FC'), Name = TRUE WHERE t.Club IS NOT NULL",
    f"UPDATE {T} SET Club = 'x' ORDER BY Name DESC LIMIT 2",
    f"UPDATE {T} SET `No of goals` = `No of goals` / 4",
    f"DELETE FROM {T} WHERE `No of goals` = 0",
    f"DELETE FROM {T} WHERE Club = 'oslo' LIMIT 1",
    f"DELETE {T} FROM {T} WHERE Club = 'oslo'",
    f"TRUNCATE TABLE {T}",
    f"UPDATE {T} SET Club = 'line\\nbreak' WHERE Name LIKE 'b%'",
]


@pytest.mark.parametrize("statement", CHANGES)
def test_a_change_leaves_the_same_table(
    statement: str, finish: Finish, mysql: MySQLBackend, players: Table
) -> None:
    hashes = []
    for backend in (SQLiteBackend(), mysql):
        session: Session = backend.session(players)
        assert finish(session.execute(statement)) == "[]"
        hashes.append(finish(session.table_hash()))
        session.close()
    assert hashes[0] == hashes[1]
    assert hashes[0] != scoring.table_hash(players)


def test_changes_add_up_and_failed_ones_leave_no_trace(
    session: Session, execute: Execute, finish: Finish, players: Table
) -> None:
    assert finish(session.table_hash()) == scoring.table_hash(players)
    execute(f"INSERT INTO {T} VALUES ('Dan', 'Bonn', '1')")
    execute(f"INSERT INTO {T} VALUES ('too', 'few')")
    execute("ROLLBACK")
    execute(f"UPDATE {T} SET Club = 'Rome' WHERE Name = 'dan'")
    assert execute(f"SELECT * FROM {T} WHERE Club = 'rome'") == "[('Dan', 'Rome', '1')]"
    rows = (*players.rows, ("Dan", "Rome", "1"))
    expected = scoring.table_hash(Table(players.name, players.columns, rows))
    assert finish(session.table_hash()) == expected


@pytest.mark.parametrize(
    ("statement", "reply"),
    [
        ("SELECT * FROM nowhere", "1146 (42S02): Table 'Team Players.nowhere' doesn't exist"),
        ("SELECT * FROM `team players`", "1146 (42S02): Table 'Team Players.team players' doesn't"),
        ("SELECT * FROM sqlite_master", "1146 (42S02): Table 'Team Players.sqlite_master' doesn't"),
        (f"SELECT Age FROM {T}", "1054 (42S22): Unknown column 'Age' in "),
        (f"SELECT Name FORM {T}", "1064 (42000): You have an error in your SQL syntax"),
        ("SELECT 1; SELECT 2", "1064 (42000): You have an error in your SQL syntax"),
        ("SELECT NOSUCH(1)", "1305 (42000): FUNCTION Team Players."),
        (f"INSERT INTO {T} VALUES (1)", "1136 (21S01): Column count doesn't match value count"),
        (f"CREATE TABLE {T} (a TEXT)", "1050 (42S01): Table 'Team Players' already exists"),
        ("", "1065 (42000): Query was empty"),
        ("USE mysql", "1044 (42000): Access denied"),
    ],
)
def test_errors_read_as_mysql_writes_them(statement: str, reply: str, execute: Execute) -> None:
    assert execute(statement).startswith(reply)


def test_a_long_reply_is_cut(execute: Execute) -> None:
    reply = execute(f"SELECT a.Name FROM {T} a, {T} b, {T} c, {T} d")
    assert len(reply) == 800 + len("[TRUNCATED]")
    assert reply.endswith("[TRUNCATED]")
