"""The bounds of the translation; what it means is tested against a server (test_backends.py)."""

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cycleqd_jax.tasks.dbbench.dialect import MAX_STATEMENT, Translated, translate
from cycleqd_jax.tasks.dbbench.errors import AgentError

WORDS = """
SELECT * FROM t WHERE GROUP BY ORDER LIMIT UPDATE SET INSERT INTO VALUES DELETE JOIN ON AND OR NOT
IN BETWEEN LIKE CASE WHEN THEN ELSE END CAST AS SIGNED DECIMAL SHOW TABLES DESCRIBE WITH UNION ALL
NULL IS EXISTS INTERVAL 1 DAY IF COUNT SUM ( ) , . ; = < > + - / % ` ' " \\ 1 2.5 1e9 a b @x := ::
|| && ! ~ -- /* */ # REPLACE TRUNCATE ALTER TABLE DROP CREATE USE t GROUP_CONCAT
"""


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS.split()), max_size=25).map(" ".join))
def test_any_text_is_translated_or_refused(statement: str) -> None:
    # Refused is right too; no other error is.
    with contextlib.suppress(AgentError):
        found = translate(statement, "t")
        assert found is None or isinstance(found, Translated)


@pytest.mark.parametrize("opening", ["(", "f(", "CASE WHEN ", "NOT ", "- ", "SELECT (", "IF(1,"])
def test_depth_costs_no_time(opening: str) -> None:
    started = time.monotonic()
    for count in (30, 300, 3000):
        with pytest.raises(AgentError):
            translate("SELECT " + opening * count, "t")
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "statement", ["DELETE SHOW t WHERE a = 1 LIMIT 1", "SHOW TABLE -- a", "EXPLAIN", "USE"]
)
def test_what_the_parser_itself_stumbles_over_is_refused(statement: str) -> None:
    with pytest.raises(AgentError, match=r"^1064|^1235"):
        translate(statement, "t")


def test_length_is_bounded() -> None:
    with pytest.raises(AgentError, match="1153"):
        translate("SELECT '" + "x" * MAX_STATEMENT + "'", "t")


def test_the_parser_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    translate("SELECT * FROM t FOR UPDATE", "t")
    with pytest.raises(AgentError):
        translate("FROBNICATE x", "t")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("statement", "writes"),
    [
        ("SELECT 1", False),
        ("WITH a AS (SELECT 1) SELECT * FROM a", False),
        ("SHOW TABLES", False),
        ("INSERT INTO t VALUES (1)", True),
        ("WITH a AS (SELECT 1) UPDATE t SET x = 1", True),
        ("ALTER TABLE t ADD COLUMN b INT", True),
    ],
)
def test_only_changes_are_played_again(statement: str, writes: bool) -> None:
    translated = translate(statement, "t")
    assert translated is not None
    assert translated.writes is writes


@pytest.mark.parametrize("statement", ["BEGIN", "COMMIT", "ROLLBACK", "SET @x = 1", "USE t"])
def test_some_statements_have_nothing_to_do(statement: str) -> None:
    assert translate(statement, "t") is None
