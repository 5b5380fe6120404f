"""DBBench on a MySQL or MariaDB server.

Every session has a database and an unprivileged user of its own, with random names; the names never
reach the agent. A statement runs in a connection of its own, as in AgentBench. One that takes too
long loses its connection, and the problem is failed. What MariaDB has beyond MySQL is refused as a
syntax error: its programs without a procedure can catch the end of their time, and can prepare a
distributed transaction, which keeps its locks for ever.
"""

import contextlib
import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, urlsplit

from cycleqd_jax.tasks.base import Call, ServiceGone
from cycleqd_jax.tasks.dbbench.backend import Steps
from cycleqd_jax.tasks.dbbench.errors import AgentError, OutOfLimits, syntax_error
from cycleqd_jax.tasks.dbbench.prompt import cut_reply
from cycleqd_jax.tasks.dbbench.records import Table

_START = (
    "start one (`apt install mariadb-server`, or "
    "`python -m cycleqd_jax.tasks.dbbench.server`, which prints its address) and give "
    "mysql://USER:PASSWORD@HOST:PORT of an account that may create users and databases"
)
# Case and accents count for nothing in MySQL 8's default; the first that the server knows.
_COLLATIONS = (
    "utf8mb4_0900_ai_ci",
    "utf8mb4_uca1400_nopad_ai_ci",
    "utf8mb4_unicode_520_ci",
    "utf8mb4_unicode_ci",
)
# Not strict: in a strict server a change that compares text with a number is an error wherever the
# text is none, and two gold statements of the public files do so.
_MODE = "NO_ENGINE_SUBSTITUTION"
_RIGHTS = "SELECT, INSERT, UPDATE, DELETE, CREATE, DROP, ALTER, INDEX, CREATE VIEW, EXECUTE"
# A connection that was killed, or a statement that was interrupted by a limit.
_TOO_LONG = {1317, 1969, 2013, 2020, 3024, 1114, 1041}
_MAX_ANSWER = 1 << 24  # bytes that the server may send for one statement
# First words of MySQL's statements; those that only MariaDB knows (XA is another's too, but of no
# use in one connection) and those that need a connection's past are left out.
# fmt: off
_VERBS = frozenset({
    "(", "ALTER", "ANALYZE", "BEGIN", "CALL", "CHECK", "CHECKSUM", "COMMIT", "CREATE",
    "DEALLOCATE", "DELETE", "DESC", "DESCRIBE", "DO", "DROP", "EXPLAIN", "FLUSH", "GRANT",
    "HANDLER", "HELP", "INSERT", "INSTALL", "KILL", "LOAD", "LOCK", "OPTIMIZE", "PREPARE",
    "RELEASE", "RENAME", "REPAIR", "REPLACE", "RESET", "REVOKE", "ROLLBACK", "SAVEPOINT",
    "SELECT", "SET", "SHOW", "SHUTDOWN", "START", "TABLE", "TRUNCATE", "UNINSTALL", "UNLOCK",
    "UPDATE", "USE", "VALUES", "WITH",
})
# fmt: on
_GAP = r"(?>\s|/\*.*?\*/|--\s[^\n]*|\#[^\n]*)*+"
_TWO_WORDS = re.compile(rf"{_GAP}(\w+|\(){_GAP}(\w*)", re.DOTALL)
_SERVER_GONE = {2003, 1040}  # nobody listens, or not to one more
_MARGIN_SECONDS = 15.0  # for the database to be made


class ServerGone(ServiceGone):
    """The server does not take connections: that is no problem's fault, and the run must end."""


class MySQLBackend:
    """Databases on a running server.

    Args:
        url: ``mysql://user:password@host:port`` of an account that may create users and databases.
        seconds: the time of one statement.

    Raises:
        ValueError: no such URL, or no server answers there; the message says how to start one.
        ImportError: ``pymysql`` is not installed.
    """

    def __init__(self, url: str, seconds: float = 5.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("mysql", "mariadb") or not parts.hostname:
            raise ValueError(f"expected mysql://USER:PASSWORD@HOST:PORT, found {url!r}")
        self.seconds = seconds
        self._address = {"host": parts.hostname, "port": parts.port or 3306}
        self._admin = {
            "user": unquote(parts.username or "root"),
            "password": unquote(parts.password or ""),
        }
        try:
            with self.connect() as admin:
                admin.execute("SHOW COLLATION")
                known = {row[0] for row in admin.fetchall()}
                admin.execute("SELECT VERSION()")
                mariadb = "MariaDB" in str(admin.fetchone())
        except ServerGone as error:
            raise ValueError(str(error)) from error
        self.collation = next(
            # MariaDB lists its newest collations without their character set.
            name
            for name in _COLLATIONS
            if known & {name, name.removeprefix("utf8mb4_")}
        )
        self.limit = (
            f"SET max_statement_time = {seconds}"
            if mariadb
            else f"SET max_execution_time = {int(1000 * seconds)}"
        )
        self._cleaners = ThreadPoolExecutor(2, "dbbench-drop")

    def session(self, table: Table) -> "MySQLSession":
        """Promise a database that holds this table."""
        return MySQLSession(self, table)

    def drop(self, name: str) -> None:
        """Remove a session's database and user, in the background."""
        self._cleaners.submit(self._drop_at_last, name)

    def close(self) -> None:
        """Wait until every session that was closed has left nothing behind."""
        self._cleaners.shutdown()

    def _drop_at_last(self, name: str) -> None:
        """Until it is gone: a statement that is being killed may hold a database for a while."""
        for pause in (0.1, 1.0, 10.0):
            try:
                self._drop(name)
            except _driver().err.Error:
                time.sleep(pause)
            else:
                return
        self._drop(name)

    def _drop(self, name: str) -> None:
        with self.connect() as admin:
            admin.execute("SELECT id FROM information_schema.processlist WHERE user = %s", (name,))
            for (connection,) in admin.fetchall():
                # It may have ended by itself.
                with contextlib.suppress(_driver().err.Error):
                    admin.execute(f"KILL {int(connection)}")
            admin.execute(f"DROP DATABASE IF EXISTS {_quote(name)}")
            admin.execute(f"DROP USER IF EXISTS {_quote(name)}")

    @contextlib.contextmanager
    def connect(self, **account: Any) -> Iterator[Any]:
        """A cursor of a fresh connection, the administrator's unless another account is given."""
        driver = _driver()
        account_or_admin = account or {**self._admin, "read_timeout": 60.0}
        options = {**self._address, **account_or_admin, "charset": "utf8mb4"}
        try:
            connection = (_bounded_connection() if account else driver.connect)(
                **options,
                autocommit=True,
                connect_timeout=10,
                local_infile=False,
                sql_mode=_MODE,
            )
        except driver.err.OperationalError as error:
            if account and error.args[0] not in _SERVER_GONE:
                raise OutOfLimits(f"no connection: {error}") from error
            where = f"{self._address['host']}:{self._address['port']}"
            raise ServerGone(f"no MySQL server answers at {where} ({error}): {_START}") from error
        cursor = connection.cursor(driver.cursors.SSCursor if account else None)
        try:
            yield cursor
        finally:
            # What is left of a result is dropped; the driver would read it to its end.
            if cursor._result is not None:
                cursor._result.unbuffered_active = False
            cursor.connection = None
            connection._force_close()


class MySQLSession:
    """A database and its user."""

    def __init__(self, backend: MySQLBackend, table: Table) -> None:
        self._backend = backend
        self._table = table
        self._name = ""
        self._password = secrets.token_hex(12)

    def execute(self, statement: str) -> Steps:
        """Run a model's statement; see `Session.execute`."""
        if not _is_mysql(statement):
            return cut_reply(str(syntax_error(statement)))
        return (yield from self._call(lambda: self._execute(statement)))

    def table_hash(self) -> Steps:
        """The hash of the table, worked out by the server; see `Session.table_hash`."""
        columns = ", ".join(map(_quote, self._table.columns))
        query = (
            "SELECT MD5(GROUP_CONCAT(digits ORDER BY digits)) FROM (SELECT "
            f"SUBSTRING(MD5(CONCAT_WS(',', {columns})), 1, 5) AS digits "
            f"FROM {_quote(self._table.name)}) AS hashed"
        )
        return (yield from self._call(lambda: self._execute(query)))

    def close(self) -> None:
        """Drop database and user."""
        if self._name:
            self._backend.drop(self._name)
            self._name = ""

    def _call(self, function: Callable[[], str]) -> Steps:
        try:
            return (yield Call(function, self._backend.seconds + _MARGIN_SECONDS))
        except TimeoutError as error:
            raise OutOfLimits(str(error)) from error

    def _execute(self, statement: str) -> str:
        driver = _driver()
        if not self._name:
            self._create()
        # The server ends a statement in time unless the statement itself says otherwise.
        patience = self._backend.seconds + 1.0
        account = {
            "user": self._name,
            "password": self._password,
            "init_command": self._backend.limit,
            "read_timeout": patience,
            "write_timeout": patience,
        }
        try:
            with self._backend.connect(**account) as cursor:
                cursor.execute(f"USE {_quote(self._name)}")
                cursor.execute(statement)
                return cut_reply(self._hide(_show(cursor)))
        except driver.err.Error as error:
            code, message = (*error.args, "", "")[:2]
            if code in _TOO_LONG:
                raise OutOfLimits(str(error)) from error
            found = AgentError(int(code or 1105), str(message))
            return cut_reply(self._hide(str(found)))
        except (RuntimeError, ValueError) as error:
            # The driver's own refusals: local files, what cannot be encoded.
            return cut_reply(self._hide(str(AgentError(1105, str(error)))))

    def _create(self) -> None:
        name = f"dbbench{secrets.token_hex(8)}"
        table = _quote(self._table.name)
        columns = ", ".join(f"{_quote(column)} TEXT" for column in self._table.columns)
        places = ", ".join(["%s"] * len(self._table.columns))
        self._name = name
        with self._backend.connect() as admin:
            collation = f"CHARACTER SET utf8mb4 COLLATE {self._backend.collation}"
            admin.execute(f"CREATE DATABASE {_quote(name)} {collation}")
            admin.execute(f"CREATE USER {_quote(name)} IDENTIFIED BY '{self._password}'")
            admin.execute(f"GRANT {_RIGHTS} ON {_quote(name)}.* TO {_quote(name)}")
            admin.execute(f"USE {_quote(name)}")
            admin.execute(f"CREATE TABLE {table} ({columns})")
            # One statement for all rows: `executemany` would not see a name with a parenthesis.
            rows = ", ".join([f"({places})"] * len(self._table.rows))
            if rows:
                cells = [cell for row in self._table.rows for cell in row]
                quoted = table.replace("%", "%%")
                admin.execute(f"INSERT INTO {quoted} VALUES {rows}", cells)

    def _hide(self, text: str) -> str:
        # AgentBench names the database after the table.
        name = self._name
        if not name:
            return text  # closed meanwhile: nobody reads it
        text = re.sub(rf"'{name}'@'[^']*'", "'agent'@'localhost'", text)
        return text.replace(name, self._table.name)


def _show(cursor: Any) -> str:
    """As many rows as fit in a reply, as Python shows them."""
    if cursor.description is None:
        return "[]"
    rows, size = [], 2
    while size < 1000 and (row := cursor.fetchone()) is not None:
        rows.append(row)
        size += len(str(row)) + 2
    return str(rows)


def _is_mysql(statement: str) -> bool:
    """Whether a statement begins as one of MySQL's; one without words is the server's to judge."""
    if not statement.strip("; \t\r\n"):
        return True
    words = _TWO_WORDS.match(statement)
    # A comment with an exclamation mark is no comment, and its version decides for whom.
    if words is None or "/*!" in words[0] or "/*M!" in words[0]:
        return False
    verb, second = words[1].upper(), words[2].upper()
    others = {"BEGIN": second in ("", "WORK"), "SET": second != "STATEMENT"}
    return verb in _VERBS and others.get(verb, True)


def _quote(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


@lru_cache
def _bounded_connection() -> Any:
    """The driver's connection, for a server that may send only so much: it reads rows whole."""
    driver = _driver()

    class Bounded(driver.connections.Connection):  # type: ignore[name-defined]
        left = _MAX_ANSWER

        def _read_bytes(self, num_bytes: int) -> bytes:
            self.left -= num_bytes
            if self.left < 0:
                raise driver.err.OperationalError(2020, f"more than {_MAX_ANSWER} bytes of answer")
            return super()._read_bytes(num_bytes)

    return Bounded


def _driver() -> Any:
    try:
        import pymysql
        import pymysql.cursors
    except ImportError as missing:
        raise ImportError(
            "DBBench on a MySQL server needs pymysql: pip install 'cycleqd-jax[tasks]'"
        ) from missing
    return pymysql
