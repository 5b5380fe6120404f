"""Progress with the time left: a live bar on a terminal, a plain line now and then elsewhere.

Bars may be nested: inner ones are drawn below the outer one. Where the output is no terminal (a log
file, CI) nothing is drawn; a step that ends 10 seconds or more after the last line prints one.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import TypeVar

import rich
import rich.progress
from rich.console import Console
from rich.text import Text

T = TypeVar("T")


def track(
    iterable: Iterable[T],
    description: str,
    total: int | None = None,
    *,
    transient: bool = False,
    console: Console | None = None,
) -> Iterator[T]:
    """Yields the items while showing how far the loop is and how long it will still take.

    Args:
        iterable: what to loop over.
        description: what is being done.
        total: number of items; taken from the iterable if it has a length.
        transient: True removes the bar when the loop ends (for bars inside a longer one).
        console: where to show it; the terminal's standard output by default.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(description, total, transient=transient, console=console) as progress:
        for item in iterable:
            yield item
            progress.advance()


class Progress:
    """A progress display moved by hand: ``with Progress("evolve", 200) as p: p.advance(note=…)``.

    Args:
        description: what is being done.
        total: number of steps; None if unknown (the time passed is shown instead of the time left).
        transient: True removes the bar when the block ends.
        console: where to show it; the terminal's standard output by default.
        interval: seconds between plain lines where there is no terminal.
        clock: returns seconds; for tests.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        *,
        transient: bool = False,
        console: Console | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.description, self.total = description, total
        self.completed = 0
        self.note = ""
        self._console = rich.get_console() if console is None else console
        self._interval = interval
        self._clock = clock
        self._transient = transient
        self._pace = _Pace(clock())
        self._bar: rich.progress.Progress | None = None
        self._task = rich.progress.TaskID(0)
        self._last_line = clock()
        self._printed = False

    def __enter__(self) -> "Progress":
        self._pace = _Pace(self._clock())
        self._last_line = self._clock()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = self._make_bar()
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._printed and self.completed:
            self._print_line()

    def advance(self, steps: int = 1, *, note: str | None = None) -> None:
        """Moves on by some steps; `note` (``coverage 12%  best .71``) stays until the next one."""
        self.completed += steps
        if note is not None:
            self.note = note
        if steps:
            self._pace.add(self._clock(), self.completed)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.completed, note=self.note)
        elif self._clock() - self._last_line >= self._interval:
            self._print_line()

    def set_note(self, note: str) -> None:
        """Shows another note without moving on."""
        self.advance(0, note=note)

    def time_left(self) -> float | None:
        """Seconds the remaining steps will take at the recent pace; None if that is unknown."""
        return None if self.total is None else self._pace.left(self._clock(), self.total)

    def time_text(self) -> str:
        """The time left in words, or the time passed when the end is reached or unknown."""
        passed = _clock_text(self._pace.passed(self._clock()))
        if self.total is None:
            return passed
        if self.completed >= self.total:
            return f"in {passed}"
        left = self.time_left()
        return "time left ?" if left is None else f"{_clock_text(left)} left"

    def _make_bar(self) -> rich.progress.Progress:
        bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            _TimeColumn(self),
            rich.progress.TextColumn("{task.fields[note]}", style="cyan", markup=False),
            console=self._console,
            transient=self._transient,
            refresh_per_second=4,
        )
        self._task = bar.add_task(self.description, total=self.total, note="")
        return bar

    def _print_line(self) -> None:
        self._last_line = self._clock()
        self._printed = True
        share = f" ({self.completed / self.total:.0%})" if self.total else ""
        count = f"{self.completed}" + (f"/{self.total}" if self.total is not None else "") + share
        parts = [self.description, count, self.time_text(), self.note]
        line = Text("  ".join(part for part in parts if part))
        self._console.print(line, soft_wrap=True, highlight=False)


class _TimeColumn(rich.progress.ProgressColumn):
    max_refresh = 0.5

    def __init__(self, progress: Progress):
        super().__init__()
        self._progress = progress

    def render(self, task: rich.progress.Task) -> Text:
        return Text(self._progress.time_text(), style="progress.remaining")


class _Pace:
    """Seconds a step, over the last 64 updates.

    From the third update on the first one is left out: it often holds a compilation.
    """

    def __init__(self, start: float):
        self._start = start
        self._samples: deque[tuple[float, int]] = deque([(start, 0)], maxlen=64)
        self._updates = 0

    def add(self, now: float, completed: int) -> None:
        self._samples.append((now, completed))
        self._updates += 1
        if self._updates == 3:
            self._samples.popleft()

    def passed(self, now: float) -> float:
        return now - self._start

    def left(self, now: float, total: int) -> float | None:
        (then, before), (latest, completed) = self._samples[0], self._samples[-1]
        if completed <= before:
            return None
        step = (latest - then) / (completed - before)
        return max(0.0, step * (total - completed) - (now - latest))


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
