"""Which processes are joined, and what is refused."""

import socket

import pytest

from cycleqd_jax.runs.hosts.joining import _check_port, in_cluster, joined_hosts
from cycleqd_jax.runs.hosts.processes import ALONE, HostsError

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-4]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *SLURM,
        "OMPI_MCA_orte_hnp_uri",
        "KUBERNETES_SERVICE_HOST",
        "TPU_WORKER_HOSTNAMES",
    ):
        monkeypatch.delenv(name, raising=False)


def test_on_a_plain_machine_a_run_is_alone() -> None:
    assert not in_cluster()
    with joined_hosts() as hosts:
        assert hosts is ALONE
        assert hosts.gather(3, "x") == [3]
        assert hosts.broadcast("x") == "x"
        assert hosts.first
        assert not hosts.waiting()
        hosts.agree(1, "x", "")
        with pytest.raises(ZeroDivisionError), joined_hosts():
            raise ZeroDivisionError


def test_slurm_is_recognised_with_more_than_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert in_cluster()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert not in_cluster()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (("h:1", None, 2), "found no --process"),
        ((None, 0, None), "found no --coordinator and no --processes"),
        (("h", 0, 2), "expected HOST:PORT of process 0, found 'h'"),
        (("h:x", 0, 2), "expected HOST:PORT"),
        (("h:1", 2, 2), "expected a number from 0 to 1 with --processes 2, found 2"),
        (("h:1", -1, 2), "found -1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    where: tuple[str | None, int | None, int | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message), joined_hosts(*where):
        raise AssertionError


def test_a_taken_port_is_said() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostsError, match=f"cannot listen at port {port} .Address already"):
            _check_port(port)
