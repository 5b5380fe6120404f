"""Processes that are lost, that stop, that end with an error, and those that part in peace."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cycleqd_jax.runs.hosts import lifeline as module
from cycleqd_jax.runs.hosts.lifeline import Doors, Lifeline, knock


class Process:
    """A process of a run, here a thread."""

    def __init__(self, index: int, count: int, links: dict[int, socket.socket]) -> None:
        self.said: list[str] = []
        self.ended = threading.Event()
        self.code: int | None = None
        self.links = links
        self.lifeline = Lifeline(index, count, links, self.said.append, silence=1.5, end=self._end)

    def _end(self, code: int) -> None:
        self.code = code
        for link in self.links.values():  # as the end of a process would
            link.close()
        self.ended.set()

    def die(self) -> None:
        self.lifeline._leaving = True  # its thread, which is still there, says nothing any more
        for link in self.links.values():
            link.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Process]]:
    for name, seconds in (("_BEAT", 0.1), ("_LOOK", 0.02), ("_GRACE", 0.2), ("_FAREWELL", 5.0)):
        monkeypatch.setattr(module, f"{name}_SECONDS", seconds)
    doors = Doors("127.0.0.1")
    guests: dict[int, socket.socket] = {}
    arriving = [
        threading.Thread(target=lambda i=i: guests.update({i: knock(doors.address, i)}))
        for i in (1, 2)
    ]
    stranger = socket.create_connection(("127.0.0.1", doors.address["port"]))
    stranger.sendall(b'{"process": 1, "token": "guessed"}\n')
    for thread in arriving:
        thread.start()
    links = doors.admit(3)
    for thread in arriving:
        thread.join()
    stranger.close()
    found = [Process(0, 3, links), *(Process(i, 3, {0: guests[i]}) for i in (1, 2))]
    yield found
    for each in found:
        each.lifeline.close()


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("lost", [0, 1])
def test_the_others_end_and_say_who_is_lost(processes: list[Process], lost: int) -> None:
    processes[lost].die()
    others = [each for i, each in enumerate(processes) if i != lost]
    for each in others:
        assert each.ended.wait(20)
        assert each.code == 2
        (text,) = each.said
        assert f"process {lost} of 3 is lost (its connection closed without a word)" in text
        assert "start the same command again on every host" in text


def test_a_process_that_is_silent_is_lost(processes: list[Process]) -> None:
    stopped = processes[2].lifeline
    stopped._tell = lambda *arguments, **more: None  # type: ignore[method-assign]
    for each in processes[:2]:
        assert each.ended.wait(20)
        assert "process 2 of 3 is lost (no sign of life for 1.5 s)" in each.said[0]


@pytest.mark.parametrize("failed", [0, 2])
def test_an_error_of_one_is_told_to_all(processes: list[Process], failed: int) -> None:
    leaving = threading.Thread(target=processes[failed].lifeline.leave, args=("no room",))
    leaving.start()
    for number, each in enumerate(processes):
        if number != failed:
            assert each.ended.wait(20)
            assert each.said == [f"process {failed} of 3 has ended, and so does this one: no room"]
    leaving.join(20)
    assert not leaving.is_alive()
    assert not processes[failed].said


def test_an_error_that_all_have_is_said_once_by_each(processes: list[Process]) -> None:
    threads = [
        threading.Thread(target=each.lifeline.leave, args=("none could be scored",))
        for each in reversed(processes)
    ]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    assert not any(each.said or each.ended.is_set() for each in processes)
    for each in processes[1:]:
        each.links[0].shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_parting_in_peace_ends_nobody(processes: list[Process]) -> None:
    time.sleep(2.0)  # longer than silence: signs of life arrive
    for each in processes:
        each.lifeline.close()
    wait(lambda: not any(t.name == "lifeline" for t in threading.enumerate()))
    assert not any(each.said or each.ended.is_set() for each in processes)


def test_a_process_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 0.2)
    doors = Doors("127.0.0.1")
    with pytest.raises(ConnectionError, match=r"expected connections of the processes \[1, 2\]"):
        doors.admit(3)
    with pytest.raises(ConnectionError, match="process 1: expected process 0 at 127"):
        knock(doors.address, 1)
