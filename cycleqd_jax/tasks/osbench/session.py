"""One episode's system, as parts of the episode: what waits is called in a thread."""

import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from cycleqd_jax.sandbox.machines import MachineLost, Turn
from cycleqd_jax.tasks.base import Ask, Call, Run
from cycleqd_jax.tasks.osbench.backend import Backend, System
from cycleqd_jax.tasks.osbench.records import Record, Script

R = TypeVar("R")
Steps = Generator[Ask | Run | Call, Any, R]
# Of a command the agent waits as long as v0.2 does when nothing is printed.
TURN_SECONDS, SCRIPT_SECONDS = 5.0, 30.0
_BOOT_SECONDS = 60.0
_MARGIN_SECONDS = 15.0


class Session:
    """A system that is started before its first use and closed with the episode.

    Args:
        backend: starts it.
        record: the problem, which says how it is set up and judged.
        turn_seconds: how long a command of the agent is waited for; then it goes on without being
            waited for, and what is typed next is its input.
        script_seconds: time of each script of the problem.
    """

    def __init__(
        self,
        backend: Backend,
        record: Record,
        turn_seconds: float = TURN_SECONDS,
        script_seconds: float = SCRIPT_SECONDS,
    ) -> None:
        self._backend = backend
        self._record = record
        self._turn_seconds = turn_seconds
        self._script_seconds = script_seconds
        self._system: System | None = None
        self._shell_ended = self._closed = False
        self._lock = threading.Lock()

    def set_up(self) -> Steps[None]:
        """Start the system and bring it where the problem begins.

        Raises:
            MachineLost: it ended, or took too long.
        """
        scripts = len(self._record.init) + 1
        yield from self._call(self._set_up, _BOOT_SECONDS + scripts * self._script_seconds)

    def type(self, code: str) -> Steps[str]:
        """Type the agent's code in its shell; what the terminal shows.

        Raises:
            MachineLost: the system was ended at a limit, or the shell had ended before.
        """
        turn = yield from self._call(lambda: self._type(code), self._turn_seconds)
        return turn.output

    def judge(self, answer: str | None) -> Steps[bool]:
        """Whether all checks pass: each must end with 0.

        Raises:
            MachineLost: the system was ended at a limit.
        """
        seconds = len(self._record.checks) * self._script_seconds
        return (yield from self._call(lambda: self._judge(answer), seconds))

    def close(self) -> None:
        """End the system, also one that is only about to start."""
        with self._lock:
            self._closed = True
            if self._system is not None:
                self._system.close()

    def _call(self, function: Callable[[], R], seconds: float) -> Steps[R]:
        try:
            return (yield Call(function, seconds + _MARGIN_SECONDS))
        except TimeoutError as error:
            raise MachineLost(f"no answer in {seconds + _MARGIN_SECONDS:.0f} s") from error

    def _set_up(self) -> None:
        system = self._backend.boot()
        with self._lock:
            self._system = system
            if self._closed:
                system.close()
                raise MachineLost("the episode has ended meanwhile")
        for script in self._record.init:
            system.run(script.command(), self._script_seconds)
        if self._record.start is not None:
            # As in v0.2 the text is typed, whatever its language.
            system.type(self._record.start.code, self._script_seconds)

    def _type(self, code: str) -> Turn:
        assert self._system is not None
        turn = self._system.type(code, self._turn_seconds)
        if self._shell_ended:
            raise MachineLost("the shell had ended before")
        self._shell_ended = turn.state == "closed"
        return turn

    def _judge(self, answer: str | None) -> bool:
        assert self._system is not None
        arguments = [str(answer)]
        for check in self._record.checks:
            script: Script | None = check or self._record.example
            assert script is not None
            try:
                ended = self._system.run(script.command(*arguments), self._script_seconds)
            except ValueError:
                return False  # an answer that no program can be given
            if ended.code != 0:
                return False
            arguments.append(ended.output)
        return True
