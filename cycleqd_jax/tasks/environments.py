"""What episodes wait for, done in the background: programs, calls, and a model that converses."""

import math
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from cycleqd_jax.sandbox.base import Outcome, Sandbox, submit
from cycleqd_jax.tasks.base import Ask, Call, Run

# Calls wait for a service rather than compute: many more of them than processors.
CALLERS = 64
# Once something has ended, others follow: taken one by one, they would keep this thread in the way
# of the one that feeds the sandbox.
_GATHER_SECONDS = 0.004
_LONG = 3600.0

W = TypeVar("W")


@dataclass(frozen=True)
class Finished(Generic[W]):
    """A step that has ended.

    Attributes:
        who: what was given with the step.
        step: the step.
        answer: the program's `Outcome`, what the function returned, or what the model said.
        error: raised instead; a `TimeoutError` where a call took more than its own seconds.
        seconds: the time the step took itself, without its wait for a turn.
        late: it took more than it was allowed; a call that did has no answer.
    """

    who: W
    step: Run | Call | Ask
    answer: Any
    error: Exception | None
    seconds: float
    late: bool


@dataclass(frozen=True)
class Started(Generic[W]):
    """A step to be done: for whom, and how many seconds it may take."""

    who: W
    step: Run | Call
    allowed: float


class Environments(Generic[W]):
    """Runs steps of many episodes at once; each is finished on its own.

    Args:
        sandbox: where programs run; it has limits of its own.
        callers: calls that are made at the same time. A call that takes too long is left alone with
            its thread, and another thread takes its place.

    Use it from one thread.
    """

    def __init__(self, sandbox: Sandbox, callers: int = CALLERS) -> None:
        self._sandbox = sandbox
        self._callers = callers
        self._ended: SimpleQueue[Finished[W] | Exception] = SimpleQueue()
        self._lock = threading.Lock()  # of what follows: threads take their next call themselves
        self._queue: deque[tuple[Started[W], Call]] = deque()
        self._made: dict[_Made[W], float] = {}

    def start(self, steps: Iterable[Started[W]]) -> None:
        """Begin steps, programs as one batch; returns at once."""
        programs, jobs = [], []
        for started in steps:
            if isinstance(started.step, Run):
                programs.append(started)
                jobs.append(started.step.job)
                continue
            with self._lock:
                self._queue.append((started, started.step))
                self._engage()
        if not programs:
            return
        futures = submit(self._sandbox, jobs)
        for started, future in zip(programs, futures, strict=True):
            future.add_done_callback(partial(self._has_run, started))

    def heard(self, who: W, ask: Ask, answer: Any) -> None:
        """The model has answered an episode; from any thread."""
        self._ended.put(Finished(who, ask, answer, None, 0.0, False))

    def failed(self, error: Exception) -> None:
        """The model cannot answer any more: `collect` raises the error; from any thread."""
        self._ended.put(error)

    def collect(self, seconds: float) -> list[Finished[W]]:
        """The steps that have ended since the last time.

        Args:
            seconds: how long to wait for a first one; 0 does not wait.
        """
        finished = self._drain()
        end = time.monotonic() + seconds
        while not finished and (left := end - time.monotonic()) > 0:
            try:
                finished = [_known(self._ended.get(timeout=min(left, self._time_to_deadline())))]
                time.sleep(_GATHER_SECONDS)
            except Empty:
                finished = []
            finished += self._drain()
        return finished

    def close(self) -> None:
        """Forget the calls that were not made yet."""
        with self._lock:
            self._queue.clear()

    def _drain(self) -> list[Finished[W]]:
        self._give_up_late_calls()
        finished = []
        while not self._ended.empty():
            finished.append(_known(self._ended.get()))
        return finished

    def _has_run(self, started: Started[W], future: Future[Outcome]) -> None:
        error = future.exception()
        if isinstance(error, Exception):
            self._ended.put(Finished(started.who, started.step, None, error, 0.0, False))
            return
        outcome = future.result()
        late = outcome.seconds > started.allowed
        self._ended.put(Finished(started.who, started.step, outcome, None, outcome.seconds, late))

    def _engage(self) -> None:
        """Let another thread begin while there are calls and free places; under the lock."""
        while self._queue and len(self._made) < self._callers:
            made = self._begin()
            # Daemons: a call that never returns must not keep the process alive.
            threading.Thread(target=self._make, args=(made,), name="call", daemon=True).start()

    def _begin(self) -> "_Made[W]":
        made = _Made(*self._queue.popleft(), time.monotonic())
        self._made[made] = made.begun + made.limit
        return made

    def _make(self, made: "_Made[W] | None") -> None:
        while made is not None:
            answer, error = None, None
            try:
                answer = made.call.function()
            except Exception as raised:
                error = raised
            seconds = time.monotonic() - made.begun
            with self._lock:
                if self._made.pop(made, None) is None:
                    return  # given up: the place belongs to another thread
                ended = made.end(seconds, answer, error)
                made = self._begin() if self._queue else None
            self._ended.put(ended)

    def _time_to_deadline(self) -> float:
        with self._lock:
            soonest = min(self._made.values(), default=math.inf)
        # Never more than a queue can be told to wait.
        return min(_LONG, max(0.0, soonest - time.monotonic()))

    def _give_up_late_calls(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [made for made, deadline in self._made.items() if deadline <= now]
            for made in late:
                del self._made[made]
                self._ended.put(made.end(made.limit, None, None))
            if late:
                self._engage()


def _known(ended: Finished[W] | Exception) -> Finished[W]:
    if isinstance(ended, Exception):
        raise ended
    return ended


class _Made(Generic[W]):
    """A call that a thread has taken up."""

    def __init__(self, started: Started[W], call: Call, begun: float) -> None:
        self.started = started
        self.call = call
        self.begun = begun
        self.limit = min(call.seconds, started.allowed)

    def end(self, seconds: float, answer: Any, error: Exception | None) -> Finished[W]:
        """What became of it after so many seconds."""
        who, step = self.started.who, self.call
        if seconds < self.limit:
            return Finished(who, step, answer, error, seconds, late=False)
        late = self.started.allowed <= step.seconds
        told = None if late else TimeoutError(f"a call took more than {step.seconds:g} s")
        return Finished(who, step, None, told, self.limit, late)
