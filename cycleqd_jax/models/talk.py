"""Conversations with many candidates: asked for at any time, decoded by threads, answered singly.

A thread takes one of the first streams (`stream.Stream`) with something to do, lets it do one
step, and looks again. There is a stream per candidate where the candidates' weights are built, else
one per thread, for rows of all candidates. Only so many candidates are built at a time: the one
that has rested longest makes room, and is built again if somebody goes on with it.
"""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from cycleqd_jax.models.requests import check_requests
from cycleqd_jax.models.specs import LlamaParams
from cycleqd_jax.models.stream import Stream

# A second stream for rows of all candidates pays from two batches of this many rows on.
_ROWS_PER_STREAM = 32

Choose = Callable[[Sequence[Sequence[int]], Sequence[int] | None], bool]


@dataclass(frozen=True)
class DecodeStats:
    """What decoding did: prompts and tokens counted without padding, seconds of wall time.

    `prefill_tokens` are those of the prompts, also where some were read before.
    """

    prompts: int = 0
    prefill_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: "DecodeStats") -> "DecodeStats":
        return DecodeStats(
            self.prompts + other.prompts,
            self.prefill_tokens + other.prefill_tokens,
            self.generated_tokens + other.generated_tokens,
            self.seconds + other.seconds,
        )

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, prefill time included."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class _Asked:
    key: Hashable
    prompt: Sequence[int]
    candidate: int
    seed: int


@dataclass(eq=False)
class _Seat:
    """A stream, opened when it is needed, and the conversations that it holds.

    `candidate` is the one whose weights are built for it, or None. `tickets` has the last text of
    every conversation, None before the first; `keys` leads back from the texts that are under way,
    `over` are texts from which nothing goes on. `steps` counts those of all seats until its last.
    """

    candidate: int | None
    stream: Stream | None = None
    busy: bool = False
    steps: int = 0
    inbox: list[_Asked] = field(default_factory=list)
    over: list[int] = field(default_factory=list)
    tickets: dict[Hashable, int | None] = field(default_factory=dict)
    keys: dict[int, Hashable] = field(default_factory=dict)

    @property
    def waits(self) -> bool:
        """Whether there is something to do."""
        return bool(self.inbox or self.keys)


class Talk:
    """Made by `Decoder.talk`; to be closed, or used in a `with`.

    Args:
        weights: of all candidates.
        max_positions: no prompt may be longer.
        choose: whether the candidates of the first prompts are built.
        open_stream: a stream for one candidate, or for rows of all (None).
        workers: threads.
        in_turns: how many streams with something to do a thread takes in turns.
        answered: is given the key of a conversation and the tokens of its next text.
        failed: is given what went wrong in a thread; nothing is answered any more then. Both are
            called from threads and should be quick.
        closed: is given what was asked and answered, when the talk is closed; the seconds are
            those in which an answer was due.
    """

    def __init__(
        self,
        weights: LlamaParams,
        max_positions: int,
        *,
        choose: Choose,
        open_stream: Callable[[int | None], Stream],
        workers: int,
        in_turns: int,
        answered: Callable[[Any, list[int]], None],
        failed: Callable[[Exception], None],
        closed: Callable[[DecodeStats], None],
    ) -> None:
        self._stats = DecodeStats()
        self._weights, self._limit = weights, max_positions
        self._choose, self._open = choose, open_stream
        self._answered, self._failed, self._tell_closed = answered, failed, closed
        self._build: bool | None = None
        self._at_once = in_turns * workers
        self._seats: dict[int, _Seat] = {}
        self._seat_of: dict[Hashable, _Seat] = {}
        self._candidate_of: dict[Hashable, int] = {}
        self._unanswered, self._since = 0, 0.0
        self._closed = False
        self._steps = 0
        self._work = threading.Condition()  # guards all of this, but for the streams of busy seats
        self._threads = [
            threading.Thread(target=self._serve, name=f"decode-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Talk":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(
        self,
        keys: Sequence[Hashable],
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        """Ask for the next texts of conversations, each named by a key of its own.

        The rest is as of `Decoder.decode`. A conversation stays with its candidate, and is asked
        for again only when it was answered. What a prompt has in common with the one before and
        its answer is not read again, as long as its keys and values are there.

        Raises:
            ValueError: as `Decoder.decode`, and for another candidate than before.
            RuntimeError: the talk is closed, or has failed.
        """
        check_requests(self._weights, self._limit, prompts, candidates, seeds)
        if not prompts:
            return
        with self._work:
            if self._closed:
                raise RuntimeError("Talk: expected to be open, but it was closed, or has failed")
            for i, key in enumerate(keys):
                candidate = 0 if candidates is None else candidates[i]
                before = self._candidate_of.get(key, candidate)
                if candidate != before:
                    raise ValueError(
                        f"prompt {i}: expected its conversation's candidate {before}, "
                        f"found {candidate}"
                    )
            if self._build is None:
                self._build = self._choose(prompts, candidates)
            if not self._unanswered:
                self._since = time.perf_counter()
            self._unanswered += len(prompts)
            self._stats += DecodeStats(len(prompts), sum(map(len, prompts)))
            if not self._build:
                self._add_streams(sum(key not in self._seat_of for key in keys))
            for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
                candidate = 0 if candidates is None else candidates[i]
                seat = self._seat_of.get(keys[i]) or self._seat(keys[i], candidate)
                seed = 0 if seeds is None else seeds[i]
                seat.inbox.append(_Asked(keys[i], prompts[i], candidate, seed))
            self._work.notify_all()

    def end(self, key: Hashable) -> None:
        """A conversation is over; where it was the last one of a stream, all of that is let go."""
        with self._work:
            seat = self._seat_of.pop(key, None)
            if seat is not None:
                del self._candidate_of[key]
                ticket = seat.tickets.pop(key)
                if ticket is not None:
                    seat.over.append(ticket)
                left = [asked for asked in seat.inbox if asked.key != key]
                self._unanswered -= len(seat.inbox) - len(left)
                seat.inbox = left
                self._release(seat)

    def close(self) -> None:
        """Stop after the steps that are under way; what is unanswered stays so."""
        with self._work:
            self._closed = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        if self._unanswered:
            self._stats += DecodeStats(seconds=time.perf_counter() - self._since)
            self._unanswered = 0
        stats, self._stats = self._stats, DecodeStats()
        self._tell_closed(stats)

    def _add_streams(self, new: int) -> None:
        """As many streams for rows of all candidates as pay with so many more of them."""
        pay = (len(self._seat_of) + new) // _ROWS_PER_STREAM
        for number in range(len(self._seats), min(len(self._threads), max(1, pay))):
            self._seats[number] = _Seat(None)

    def _seat(self, key: Hashable, candidate: int) -> _Seat:
        """Where a new conversation takes place."""
        if self._build:
            seat = self._seats.setdefault(candidate, _Seat(candidate))
        else:
            seat = min(self._seats.values(), key=lambda seat: len(seat.tickets))
        self._seat_of[key], self._candidate_of[key] = seat, candidate
        seat.tickets[key] = None
        return seat

    def _serve(self) -> None:
        while (seat := self._next()) is not None:
            try:
                texts = self._step(seat)
                self._has_stepped(seat, texts)
                for key, tokens in texts:
                    self._answered(key, tokens)
            except Exception as error:
                with self._work:
                    self._closed = True
                    self._work.notify_all()
                self._failed(error)
                return

    def _has_stepped(self, seat: _Seat, texts: Sequence[tuple[Hashable, list[int]]]) -> None:
        with self._work:
            seat.busy = False
            self._steps += 1
            seat.steps = self._steps
            self._release(seat)
            self._unanswered -= len(texts)
            over = time.perf_counter() - self._since if texts and not self._unanswered else 0.0
            generated = sum(len(tokens) for _, tokens in texts)
            self._stats += DecodeStats(generated_tokens=generated, seconds=over)

    def _next(self) -> _Seat | None:
        """A seat with something to do; None when the talk is over."""
        with self._work:
            while not self._closed:
                waiting = (seat for seat in self._seats.values() if seat.waits)
                first = [seat for seat in islice(waiting, self._at_once) if not seat.busy]
                if first:
                    seat = min(first, key=lambda seat: seat.steps)
                    seat.busy = True
                    return seat
                self._work.wait()
        return None

    def _step(self, seat: _Seat) -> list[tuple[Hashable, list[int]]]:
        """Hand over what was asked and decode some tokens; returns the texts that are finished."""
        if seat.stream is None:
            self._make_room()
            seat.stream = self._open(seat.candidate)
        with self._work:
            asked, seat.inbox = seat.inbox, []
            over, seat.over = seat.over, []
            after = [seat.tickets.get(a.key) for a in asked]
        for ticket in over:
            seat.stream.forget(ticket)
        if asked:
            tickets = seat.stream.submit(
                [a.prompt for a in asked],
                None if seat.candidate is not None else [a.candidate for a in asked],
                [a.seed for a in asked],
                after=after,
            )
            with self._work:
                for a, ticket in zip(asked, tickets, strict=True):
                    seat.keys[ticket] = a.key
                    if a.key in seat.tickets:
                        seat.tickets[a.key] = ticket
        finished = seat.stream.step()
        with self._work:
            return [(seat.keys.pop(answer.ticket), answer.tokens) for answer in finished]

    def _release(self, seat: _Seat) -> None:
        if not (seat.busy or seat.waits or seat.tickets):
            seat.stream, seat.over = None, []

    def _make_room(self) -> None:
        """Close the streams that rested longest, until one more can be opened."""
        with self._work:
            opened = [seat for seat in self._seats.values() if seat.stream is not None]
            resting = [seat for seat in opened if not (seat.busy or seat.keys)]
            resting.sort(key=lambda seat: (seat.waits, seat.steps))
            for seat in resting[: max(0, len(opened) - self._at_once + 1)]:
                seat.stream, seat.over = None, []
                seat.tickets = dict.fromkeys(seat.tickets)
