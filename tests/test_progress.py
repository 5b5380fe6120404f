import io

import pytest
from rich.console import Console

from cycleqd_jax.progress import Progress, track


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def log_console():
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def terminal_console():
    return Console(file=io.StringIO(), force_terminal=True, width=120, legacy_windows=False)


def lines(console):
    return console.file.getvalue().splitlines()


def test_track_yields_every_item_and_prints_nothing_for_a_quick_loop_in_a_log():
    console = log_console()
    assert list(track("abc", "spell", console=console)) == ["a", "b", "c"]
    assert list(track(iter(range(4)), "count", console=console)) == [0, 1, 2, 3]
    assert lines(console) == []


def test_a_log_gets_a_line_every_interval_and_one_at_the_end():
    console, clock = log_console(), Clock()
    with Progress("evolve", 8, console=console, clock=clock) as progress:
        for step in range(8):
            clock.now += 4.0
            progress.advance(note=f"coverage {step}%")
    assert lines(console) == [
        "evolve  3/8 (38%)  0:20 left  coverage 2%",
        "evolve  6/8 (75%)  0:08 left  coverage 5%",
        "evolve  8/8 (100%)  in 0:32  coverage 7%",
    ]


def test_time_left_follows_the_pace_after_a_slow_first_step_and_counts_down():
    clock = Clock()
    with Progress("compile", 10, console=log_console(), clock=clock) as progress:
        assert progress.time_left() is None
        clock.now += 60.0
        progress.advance()
        assert progress.time_left() == pytest.approx(9 * 60.0)
        for _ in range(2):
            clock.now += 2.0
            progress.advance()
        assert progress.time_left() == pytest.approx(7 * 2.0)
        clock.now += 1.5
        assert progress.time_left() == pytest.approx(7 * 2.0 - 1.5)


def test_an_unknown_total_shows_the_time_passed():
    console, clock = log_console(), Clock()
    with Progress("search", console=console, clock=clock) as progress:
        clock.now += 3700.0
        progress.advance(5)
        assert progress.time_left() is None
    assert lines(console)[0] == "search  5  1:01:40"


def test_bars_nest_on_a_terminal_and_leave_it_as_it_was():
    console = terminal_console()
    with Progress("outer [x]", 2, console=console) as outer:
        for _ in range(2):
            assert list(track(range(3), "inner", transient=True, console=console)) == [0, 1, 2]
            outer.advance(note="best .71")
    text = console.file.getvalue()
    assert "outer [x]" in text
    assert "best .71" in text
    assert "2/2" in text
    assert text.endswith("\x1b[?25h")  # the cursor is shown again


def test_an_error_in_the_loop_passes_through_and_closes_the_bar():
    console = terminal_console()

    def work():
        for _ in track(range(3), "work", console=console):
            raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        work()
    with Progress("again", 1, console=console) as progress:
        progress.advance()
    assert console.file.getvalue().endswith("\x1b[?25h")
