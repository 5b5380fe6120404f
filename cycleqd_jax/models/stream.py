"""Continuous decoding: a live batch that rows enter and leave at any time."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from cycleqd_jax.models import kernels
from cycleqd_jax.models.cache import KVCache
from cycleqd_jax.models.pasts import Past, Pasts
from cycleqd_jax.models.prefixes import Prefixes
from cycleqd_jax.models.programs import STEPS, Programs, Prompts, Resumed, Rows, prefill_pieces
from cycleqd_jax.models.requests import Answer, Request, check_requests
from cycleqd_jax.models.sampling import Sampling
from cycleqd_jax.models.schedule import (
    SlotTable,
    block_bucket,
    bucket,
    prompt_bucket,
    round_up,
    row_buckets,
    slot_bucket,
)
from cycleqd_jax.models.specs import LlamaParams
from cycleqd_jax.models.stops import StopStrings

# A batch is not made smaller than this: little is gained, and every size is compiled.
_SMALLEST_REPACK = 16
# Rows enter when this share of the batch is free: a prefill of few rows stops all others.
_ENTERING_SHARE = 4
# A token that is fed to a row costs about as much as so many that are prefilled.
_TOKENS_PER_STEP = 1.5
# Into how many blocks of their own widths rows that enter are cut at most.
_MOST_BLOCKS = 4


class Stream:
    """Rows are submitted at any time; `step` decodes some tokens and returns what is finished.

    A place in the batch that a finished row leaves is taken by the next one that waits: call after
    call of `submit`, within one call by shared prefix. Stacked weights (`kernels.StackedKernel`)
    give every candidate the same number of places. A stream belongs to one thread. Made by
    `Decoder.open`.
    """

    def __init__(
        self,
        programs: Programs,
        weights: LlamaParams,
        *,
        pad_token: int,
        max_positions: int,
        max_new_tokens: int,
        max_rows: int,
        sampling: Sampling,
        stops: StopStrings,
        keep: bool = False,
    ) -> None:
        self._programs = programs
        self._weights = weights
        self._pad = pad_token
        self._limit = max_positions
        self._max_new = max_new_tokens
        self._cuts = sampling.cuts()
        self._stops = stops
        # Places are in as many equal groups as there are stacked candidates, otherwise in one.
        stacked = kernels.is_stacked(weights)
        self._groups = (kernels.num_candidates(weights) or 1) if stacked else 1
        # Stacked candidates are split over devices themselves, whatever the size of their groups.
        self._parts = 1 if stacked else programs.parts
        self._buckets = row_buckets(max(1, max_rows // self._groups), self._parts)
        self._waiting: list[deque[Request]] = [deque() for _ in range(self._groups)]
        self._prefixes = Prefixes(partial(programs.prefix, weights), self._groups, self._buckets)
        self._places: list[Request | None] = []
        self._table = SlotTable(0, 0)
        self._state: Rows | None = None
        self._cache: KVCache | None = None
        self._pasts = Pasts(keep=keep)
        self._tickets = 0

    @property
    def pending(self) -> int:
        """How many texts are not finished."""
        live = sum(request is not None for request in self._places)
        return live + sum(map(len, self._waiting))

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        after: Sequence[int | None] | None = None,
    ) -> list[int]:
        """Add texts to be generated and return their tickets.

        `candidates` gives the candidate of every prompt (default 0), `seeds` its seed (default 0),
        which together with the prompt decides a sampled text. What many of the prompts begin with
        is prefilled once per candidate. `after` names, by its ticket, the finished text of the same
        candidate that a prompt goes on from, None for none: in a stream that keeps them, only what
        is new is read, for some steps after the text has ended and where it is not most of the
        prompt. Nothing else goes on from that text then. Raises ValueError as `Decoder.decode`
        does, and for another candidate.
        """
        check_requests(self._weights, self._limit, prompts, candidates, seeds)
        numbers = [0] * len(prompts) if candidates is None else list(candidates)
        tickets = list(range(self._tickets, self._tickets + len(prompts)))
        self._tickets += len(prompts)
        requests = [
            Request(
                ticket=tickets[i],
                prompt=tuple(prompt),
                candidate=candidate,
                seed=0 if seeds is None else seeds[i],
                left=min(self._max_new, self._limit - len(prompt)),
            )
            for i, (prompt, candidate) in enumerate(zip(prompts, numbers, strict=True))
        ]
        if after is not None:
            self._check_candidates(requests, after)
            requests = [
                r for r, of in zip(requests, after, strict=True) if not self._goes_on(r, of)
            ]
        self._prefixes.share(requests)
        for request in sorted(requests, key=lambda request: request.prefix):
            self._waiting[request.candidate if self._groups > 1 else 0].append(request)
        return tickets

    def forget(self, ticket: int) -> None:
        """Nothing goes on from a finished text: its place is free."""
        past = self._pasts.take(ticket)
        if past is not None:
            self._table.used[past.place] = False

    def _check_candidates(self, requests: Sequence[Request], after: Sequence[int | None]) -> None:
        for request, ticket in zip(requests, after, strict=True):
            past = self._pasts.get(ticket)
            if past is not None and past.candidate != request.candidate:
                raise ValueError(
                    f"expected a text to go on with its candidate {past.candidate}, found "
                    f"{request.candidate}"
                )

    def _goes_on(self, request: Request, ticket: int | None) -> bool:
        """Whether a text takes up the place of the one it follows."""
        past = self._pasts.take(ticket)
        if past is None:
            return False
        known = past.common(request.prompt)
        new = len(request.prompt) - known
        # A row that has taken many slots for its text is better read anew, into its first ones.
        taken = int(self._table.used[past.place].sum()) + new
        most = slot_bucket(prompt_bucket(len(request.prompt)) + self._max_new)
        if new * _TOKENS_PER_STEP > len(request.prompt) or taken > most:
            self._table.used[past.place] = False
            return False
        request.resumes, request.unread = known, list(request.prompt[known:])
        self._places[past.place] = request
        return True

    def step(self) -> list[Answer]:
        """Let waiting rows enter, decode up to `STEPS` tokens, and return the finished texts."""
        self._table.used[self._pasts.age()] = False
        finished = self._admit()
        if any(request is not None for request in self._places):
            finished += self._decode()
        return finished

    def _admit(self) -> list[Answer]:
        """Fill free places as far as that is worth a prefill, and fit the batch to its rows."""
        waiting = max(map(len, self._waiting))
        size = len(self._places) // self._groups
        held = max((len(rows) for rows in self._held()), default=0)
        wanted = bucket(held + waiting, self._buckets)
        smallest = round_up(max(1, _SMALLEST_REPACK // self._groups), self._parts)
        if not held:
            # Nothing has to be kept: the next rows begin a batch of their own.
            self._places, self._state, self._cache = [], None, None
            if self._pasts.keep:
                # Few come late, in any number: they share the programs of small batches.
                wanted = max(wanted, min(smallest, self._buckets[-1]))
            return self._enter(wanted) if waiting else []
        if (waiting and wanted > size) or (not waiting and max(wanted, smallest) < size):
            size = max(wanted, min(size, smallest))
            self._resize(size)
        entering = round_up(max(1, size // _ENTERING_SHARE), self._parts)
        finished: list[Answer] = []
        while (waiting := max(map(len, self._waiting))) and self._spare() >= min(waiting, entering):
            finished += self._enter(entering)
        return finished

    def _spare(self) -> int:
        """Free places, in the group with the fewest."""
        return len(self._places) // self._groups - max(map(len, self._held()))

    def _held(self) -> list[list[int]]:
        """The places of the rows that are live, or may go on, per group."""
        size, resting = len(self._places) // self._groups, self._pasts.places
        return [
            [
                p
                for p in range(g * size, (g + 1) * size)
                if self._places[p] is not None or p in resting
            ]
            for g in range(self._groups)
        ]

    def _enter(self, size: int) -> list[Answer]:
        """Prefill up to `size` waiting rows per group and put them into the batch."""
        fresh = not self._places
        places = size if fresh else len(self._places) // self._groups
        chosen: list[Request | None] = []
        target: list[int] = []
        shared = next(queue[0] for queue in self._waiting if queue).prefix
        held = set() if fresh else {place for group in self._held() for place in group}
        for group, queue in enumerate(self._waiting):
            first = group * places
            free = [p for p in range(first, first + places) if fresh or p not in held]
            taken: list[Request] = []
            # Rows that enter together have their prefix in common, or have none.
            while queue and len(taken) < min(size, len(free)) and queue[0].prefix == shared:
                taken.append(queue.popleft())
            taken.sort(key=lambda request: -len(request.prompt))
            chosen += [*taken, *[None] * (size - len(taken))]
            target += [*free[: len(taken)], *[-1] * (size - len(taken))]
        if fresh:
            self._places = [None] * len(chosen)
        blocks = self._blocks(chosen, len(shared))
        round_width = prompt_bucket if len(blocks) == 1 else block_bucket
        # All are under way before the host looks at what came of the first.
        entered = [self._place(chosen[b], target[b], shared, round_width) for b in blocks]
        finished = []
        for block, (first_tokens, done) in zip(blocks, map(jax.device_get, entered), strict=True):
            for i, place in enumerate(target[block]):
                if place >= 0:
                    finished += self._extend(place, first_tokens[i : i + 1], bool(done[i]))
        return finished

    def _blocks(self, requests: Sequence[Request | None], before: int) -> list[slice]:
        """Equal parts of the rows that enter, longest first, each prefilled in its own width.

        One part where that is all the same: of few tokens, of equal widths. One part too where the
        rows are in groups or on several devices: parts would have to be cut from each of them.
        """
        whole = [slice(0, len(requests))]
        if self._groups > 1 or self._parts > 1:
            return whole
        lengths = [len(request.prompt) - before for request in requests if request is not None]
        pieces = prefill_pieces(len(requests), prompt_bucket(lengths[0]))
        size = len(requests) // min(pieces, _MOST_BLOCKS)
        starts = range(0, len(lengths), size)
        if len({block_bucket(lengths[start]) for start in starts}) == 1:
            return whole
        return [slice(start, start + size) for start in starts]

    def _place(
        self,
        requests: Sequence[Request | None],
        target: Sequence[int],
        shared: tuple[int, ...],
        round_width: Callable[[int], int],
    ) -> tuple[Array, Array]:
        """Prefill a block of rows and put them into their places, -1 where there is no row.

        Returns the first tokens and whether they are the last ones, both (rows,).
        """
        first_tokens, entering, block = self._prefill(requests, shared, round_width)
        needed = slot_bucket(block.slots + STEPS)
        size = len(self._places)
        if self._state is None:
            # The block begins the batch: its rows stand in the first places, in all if there are no
            # other blocks. Copies of its first row, which are not live, fill the batch up.
            self._table = SlotTable(len(requests), block.slots)
            self._state, self._cache = entering, block
            order = np.arange(size)
            self._repack(np.where(order < len(requests), order, 0), needed)
        else:
            if needed > self._table.slots:
                self._repack(np.arange(size), needed)
            index = np.array([p if p >= 0 else size for p in target], np.int32)
            self._state, self._cache = self._programs.insert(
                self._state, self._cache, entering, block, index
            )
        for request, place in zip(requests, target, strict=True):
            if request is not None:
                self._places[place] = request
                self._table.enter([place], block.slots)
        return first_tokens, entering.done

    def _prefill(
        self,
        requests: Sequence[Request | None],
        shared: tuple[int, ...],
        round_width: Callable[[int], int],
    ) -> tuple[Any, Rows, KVCache]:
        size, before = len(requests), len(shared)
        longest = max(len(r.prompt) for r in requests if r is not None) - before
        width = min(round_width(longest), self._limit - before)
        prompts = Prompts(
            tokens=np.full((size, width), self._pad, np.int32),
            lengths=np.ones(size, np.int32),
            left=np.zeros(size, np.int32),
            candidate=np.zeros(size, np.int32),
            seed=np.zeros(size, np.int32),
            prefix=np.zeros(size, np.int32),
        )
        for row, request in enumerate(requests):
            if request is None:
                continue
            own = request.prompt[before:]
            prompts.tokens[row, : len(own)] = own
            prompts.lengths[row] = len(own)
            prompts.left[row] = request.left
            prompts.candidate[row] = request.candidate
            prompts.seed[row] = request.seed
        cache = None
        if shared:
            cache, prompts.prefix[:] = self._prefixes.enter(shared, requests)
        return self._programs.enter(self._weights, prompts, cache, self._cuts)

    def _decode(self) -> list[Answer]:
        """One chunk for the batch."""
        free = self._table.free()
        if len(free) < STEPS:
            keep = np.arange(len(self._places))
            self._repack(keep, slot_bucket(self._table.slots - len(free) + STEPS))
            free = self._table.free()
        slots = free[:STEPS].astype(np.int32)
        live = np.array([request is not None for request in self._places])
        resumed = self._resumed() if self._pasts.keep else None
        out, self._state, self._cache = self._programs.chunk(
            self._weights, self._state, self._cache, live, slots, self._cuts, resumed
        )
        out, done = np.asarray(out), np.asarray(self._state.done)
        self._table.used[np.flatnonzero(live)[:, None], slots] = True
        finished = []
        for place in np.flatnonzero(live):
            finished += self._extend(int(place), out[:, place], bool(done[place]))
        return finished

    def _resumed(self) -> Resumed:
        """The rows that go on, and the next tokens that are fed to them."""
        size = len(self._places)
        rows = Resumed(
            now=np.zeros(size, bool),
            token=np.zeros(size, np.int32),
            position=np.zeros(size, np.int32),
            left=np.zeros(size, np.int32),
            seed=np.zeros(size, np.int32),
            forced=np.full((STEPS, size), -1, np.int32),
        )
        for place, request in enumerate(self._places):
            if request is None or not request.unread:
                continue
            if request.resumes is not None:
                rows.now[place] = True
                rows.token[place], rows.position[place] = request.unread.pop(0), request.resumes
                rows.left[place], rows.seed[place] = request.left, request.seed
                request.resumes = None
            fed, request.unread = request.unread[:STEPS], request.unread[STEPS:]
            rows.forced[: len(fed), place] = fed
        return rows

    def _extend(self, place: int, tokens: np.ndarray, done: bool) -> list[Answer]:
        """Add tokens to the text in a place; free the place where the text ends."""
        request = self._places[place]
        assert request is not None
        new = tokens[tokens >= 0].tolist()
        request.text += new
        end = self._stops.end(request.text, len(new))
        if end is not None:
            del request.text[end:]
        elif not done:
            return []
        self._places[place] = None
        # The last token may have been chosen, but not read.
        past = Past(request.candidate, (*request.prompt, *request.text[:-1]), place)
        if not self._pasts.rest(request.ticket, past):
            self._table.used[place] = False
        return [Answer(request.ticket, request.text)]

    def _resize(self, size: int) -> None:
        """Give every group `size` places; rows that are held move together, unused slots go."""
        keep: list[int] = []
        places: list[Request | None] = []
        moved: dict[int, int] = {}
        for held in self._held():
            moved |= {place: len(keep) + i for i, place in enumerate(held)}
            spare = size - len(held)
            # Copies of some row fill the group up; they are not live.
            keep += [*held, *[0] * spare]
            places += [*[self._places[p] for p in held], *[None] * spare]
        self._places = places
        self._pasts.move(moved)
        self._repack(np.array(keep), slot_bucket(self._table.end + STEPS))
        self._table.used[sorted(set(range(len(places))) - set(moved.values()))] = False

    def _repack(self, keep: np.ndarray, slots: int) -> None:
        self._table.reshape(keep, slots)
        self._state, self._cache = self._programs.repack(
            self._state, self._cache, keep.astype(np.int32), slots
        )
