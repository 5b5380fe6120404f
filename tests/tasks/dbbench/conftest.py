"""A table, its sessions on both kinds of database, and the public files where there are some."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cycleqd_jax
from cycleqd_jax.sandbox import Sandbox
from cycleqd_jax.tasks.base import Call, Run
from cycleqd_jax.tasks.dbbench.backend import Backend, Session, Steps
from cycleqd_jax.tasks.dbbench.mysql import MySQLBackend
from cycleqd_jax.tasks.dbbench.records import Table
from cycleqd_jax.tasks.dbbench.server import missing_programs, private_server
from cycleqd_jax.tasks.dbbench.sqlite import SQLiteBackend

Finish = Callable[[Steps], str]
Execute = Callable[[str], str]

PLAYERS = Table(
    "Team Players",
    ("Name", "Club", "No of goals"),
    (
        ("Zoë Müller", "Köln", "9"),
        ("Bob", "oslo", "10"),
        ("ann", "Oslo", "-"),
        ("Carl", None, "1,200"),
        ("Øystein", "Bern", "2.5"),
    ),
)


@pytest.fixture(scope="session")
def players() -> Table:
    return PLAYERS


@pytest.fixture(scope="session")
def finish(sandbox: Sandbox) -> Finish:
    """What a part of an episode returns, with whatever it asks for done at once."""

    def play(steps: Steps) -> str:
        answer = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as end:
                return str(end.value)
            if isinstance(step, Run):
                (answer,) = sandbox.run([step.job])
            else:
                assert isinstance(step, Call)
                answer = step.function()

    return play


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a private MariaDB server."""
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not installed (apt install mariadb-server)")
    with private_server() as url:
        yield url


@pytest.fixture(scope="session")
def mysql(server: str) -> Iterator[MySQLBackend]:
    backend = MySQLBackend(server, seconds=20.0)
    yield backend
    backend.close()


@pytest.fixture(params=["sqlite", "mysql"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return SQLiteBackend() if request.param == "sqlite" else request.getfixturevalue("mysql")


@pytest.fixture
def session(backend: Backend, players: Table) -> Iterator[Session]:
    opened = backend.session(players)
    yield opened
    opened.close()


@pytest.fixture
def execute(session: Session, finish: Finish) -> Execute:
    return lambda statement: finish(session.execute(statement))


@pytest.fixture(scope="session")
def public_files() -> Path:
    """The folder with the public files; `$CYCLEQD_DATA`, or shared/data beside the checkout."""
    beside = Path(cycleqd_jax.__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CYCLEQD_DATA", beside)) / "agentbench" / "dbbench"
    if not (folder / "standard.jsonl").is_file():
        pytest.skip(f"no DBBench files in {folder} (set CYCLEQD_DATA)")
    return folder
