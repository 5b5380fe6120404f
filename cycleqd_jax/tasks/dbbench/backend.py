"""What a database has to do for an episode."""

from collections.abc import Generator
from typing import Any, Protocol, runtime_checkable

from cycleqd_jax.tasks.base import Ask, Call, Run
from cycleqd_jax.tasks.dbbench.records import Table

Steps = Generator[Ask | Run | Call, Any, str]


@runtime_checkable
class Session(Protocol):
    """One problem's own database, made for one episode. Its methods are parts of the episode."""

    def execute(self, statement: str) -> Steps:
        """Run a model's statement; return MySQL's reply, at most 800 characters of it.

        Raises:
            OutOfLimits: it took too much time, memory or room.
        """

    def table_hash(self) -> Steps:
        """The hash of the problem's table as it is now (`scoring.table_hash`), or an error's text.

        Raises:
            OutOfLimits: as above.
        """

    def close(self) -> None:
        """Leave nothing behind; safe to repeat."""


@runtime_checkable
class Backend(Protocol):
    """A kind of database."""

    def session(self, table: Table) -> Session:
        """Promise a database that holds this table; nothing is made before its first use."""
