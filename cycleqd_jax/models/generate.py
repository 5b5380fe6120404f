"""Decoding of many prompts of many candidates, each row with its own candidate's weights.

The prompts of a call are dealt to streams (`stream.Stream`), one batch each: one per worker where
rows of all candidates share batches, one per candidate where the candidates' weights are built.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cycleqd_jax.models import kernels
from cycleqd_jax.models.cache import unstack_layers
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.programs import Placement, Programs
from cycleqd_jax.models.requests import check_requests
from cycleqd_jax.models.sampling import Sampling
from cycleqd_jax.models.specs import LlamaParams
from cycleqd_jax.models.stops import StopStrings
from cycleqd_jax.models.stream import Stream

# Processor time of rows over that of building each candidate, at width 128 with 96 prompts per
# candidate: 0.9 at a share of 0.27, 1.4 at 1.1, 2.6 at 4.3. The threshold lies between; it was not
# measured itself.
_ROWS_PER_CANDIDATE = 16
_DEAR_SPECTRAL_SHARE = 0.4
# A second worker pays from two batches of this many rows on.
_ROWS_PER_WORKER = 32

_KEPT_BATCHES = 4

MAX_ROWS = 256
"""Rows of the largest batch, of one device."""

MODES = ("auto", "rows", "candidates")
GREEDY = Sampling()


@dataclass(frozen=True)
class _Job:
    """Prompts that are decoded in one stream, with the candidate to build or None."""

    candidate: int | None
    rows: list[int]


@dataclass(frozen=True)
class DecodeStats:
    """What decoding did: prompts and tokens counted without padding, seconds of wall time."""

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


class Decoder:
    """Decodes prompts greedily or by sampling, each row with its own candidate's weights.

    Keep one instance for a whole run: it owns the compiled programs, and new gains or weights of
    the same shapes reuse them (`traces` counts the compilations). `stop_tokens` end an answer and
    are not part of it; `stop_strings` end it with the token that completes one (`stops.cut` takes
    it from the text) and need `detokenize`. Answers are also cut at `max_new_tokens` and where the
    context of `config.max_positions` is full.

    Answers do not depend on what else is decoded in the same call, nor on `mode`, up to the
    rounding of matrix products. In float32 that leaves the tokens the same: a product's rounding
    is four orders of magnitude below usual distances of logits. In bfloat16 it is not, and batches
    of different sizes may part at close calls.

    - "rows": rows of all candidates share batches, W(g) is never built. Reads the weights once for
      the population: right where reading weights is what takes the time (accelerators, big models,
      few prompts per candidate).
    - "candidates": one candidate after the other, its W(g) built on the fly and dropped. Fewest
      arithmetic operations once a candidate has more tokens than W has rows: right for a CPU.
    - "auto": "candidates" on a CPU where the low-rank products of "rows" would cost a notable share
      of the dense ones and every candidate has enough prompts to fill its own batches; else "rows".

    Weights that are built and stacked already (`kernels.stack`) are always decoded together, with
    as many rows of each candidate in a batch. `max_rows` is the size of the largest batch.
    `workers` batches are decoded at the same time (default: one per core on a CPU, else one), since
    the small products of a decoding step leave a second core partly idle.

    Weights may be sharded over several devices; `placement` then splits the batches too
    (`sharding.batch_placement`): `max_rows` are those of one part, and a batch that the parts do
    not divide is filled up.
    """

    def __init__(
        self,
        params: LlamaParams | None,
        config: LlamaConfig,
        *,
        stop_tokens: Sequence[int],
        pad_token: int,
        max_new_tokens: int = 48,
        max_rows: int = MAX_ROWS,
        mode: str = "auto",
        workers: int | None = None,
        stop_strings: Sequence[str] = (),
        detokenize: Callable[[Sequence[int]], str] | None = None,
        placement: Placement | None = None,
    ) -> None:
        for token in (*stop_tokens, pad_token):
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    "Decoder: expected stop and pad tokens "
                    f"in [0, {config.vocab_size}), got {token}"
                )
        if max_new_tokens < 1 or max_rows < 1:
            raise ValueError(
                "Decoder: expected max_new_tokens and max_rows of at least 1, "
                f"got {max_new_tokens} and {max_rows}"
            )
        if workers is not None and workers < 1:
            raise ValueError(f"Decoder: expected workers of at least 1, got {workers}")
        if mode not in MODES:
            raise ValueError(f"Decoder: expected a mode of {MODES}, got {mode!r}")
        self.config = config
        self.stats = DecodeStats()
        self.stops = StopStrings(stop_strings, detokenize)
        self._params = None if params is None else unstack_layers(params)
        self._pad = pad_token
        self._max_new = max_new_tokens
        self._max_rows = max_rows * (1 if placement is None else placement.parts)
        self._mode = mode
        # Programs over several devices must be started in one order: by one thread.
        alone = jax.default_backend() != "cpu" or placement is not None
        self._workers = workers or (1 if alone else _cores())
        self._programs = Programs(config, stop_tokens, placement)

    @property
    def traces(self) -> int:
        """How many programs were compiled so far."""
        return self._programs.traces

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[int] | None = None,
        params: LlamaParams | None = None,
        on_finished: Callable[[int], None] | None = None,
        *,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        stops: StopStrings | None = None,
    ) -> list[list[int]]:
        """The answers to `prompts`, in their order, as lists of token ids.

        `candidates` gives the candidate of every prompt where `params` (or the parameters of the
        constructor) hold kernels of a population; None, or zeros, with plain weights. `seeds` are
        the prompts' own, in [0, 2^31); a sampled answer follows from prompt, weights, `sampling`
        and seed. `max_new_tokens` and `stops` take the place of the constructor's for this call and
        compile nothing. `on_finished` is called, from any thread but once at a time, with the
        number of prompts done since its last call. Raises ValueError for an empty prompt, one that
        leaves no room for a token, candidates that do not exist, and less than one new token.
        """
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(
                f"Decoder: expected max_new_tokens of at least 1, got {max_new_tokens}"
            )
        weights = self._weights(params)
        check_requests(weights, self.config.max_positions, prompts, candidates, seeds)
        start = time.perf_counter()
        answers: list[list[int]] = [[] for _ in prompts]
        lock = threading.Lock()

        def play(job: _Job) -> None:
            chosen, numbers = weights, candidates
            if job.candidate is not None:
                chosen, numbers = self._programs.build(weights, jnp.int32(job.candidate)), None
            stream = self._stream(chosen, sampling, max_new_tokens, stops)
            tickets = stream.submit(
                [prompts[i] for i in job.rows],
                None if numbers is None else [numbers[i] for i in job.rows],
                None if seeds is None else [seeds[i] for i in job.rows],
            )
            row_of = dict(zip(tickets, job.rows, strict=True))
            while stream.pending:
                finished = stream.step()
                for answer in finished:
                    answers[row_of[answer.ticket]] = answer.tokens
                if finished and on_finished is not None:
                    with lock:
                        on_finished(len(finished))

        with ThreadPoolExecutor(self._workers) as pool:
            list(pool.map(play, self._plan(prompts, candidates, weights)))
        self.stats += DecodeStats(
            prompts=len(prompts),
            prefill_tokens=sum(map(len, prompts)),
            generated_tokens=sum(map(len, answers)),
            seconds=time.perf_counter() - start,
        )
        return answers

    def open(self, params: LlamaParams | None = None, *, sampling: Sampling = GREEDY) -> Stream:
        """A live batch to which prompts are submitted at any time, on the calling thread."""
        return self._stream(self._weights(params), sampling, kept_batches=_KEPT_BATCHES)

    def _weights(self, params: LlamaParams | None) -> LlamaParams:
        weights = self._params if params is None else unstack_layers(params)
        if weights is None:
            raise ValueError("Decoder: expected params here or in the constructor, got none")
        return weights

    def _stream(
        self,
        weights: LlamaParams,
        sampling: Sampling,
        max_new_tokens: int | None = None,
        stops: StopStrings | None = None,
        kept_batches: int = 0,
    ) -> Stream:
        return Stream(
            self._programs,
            weights,
            pad_token=self._pad,
            max_positions=self.config.max_positions,
            max_new_tokens=self._max_new if max_new_tokens is None else max_new_tokens,
            max_rows=self._max_rows,
            sampling=sampling,
            stops=self.stops if stops is None else stops,
            kept_batches=kept_batches,
        )

    def _plan(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[int] | None,
        weights: LlamaParams,
    ) -> list[_Job]:
        """Deal the prompts to streams, short ones first."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        present = sorted(set(candidates or ()))
        mode = self._mode
        if mode == "auto":
            enough = len(prompts) >= _ROWS_PER_CANDIDATE * len(present)
            dear = kernels.spectral_share(weights) > _DEAR_SPECTRAL_SHARE
            build = jax.default_backend() == "cpu" and enough and dear
            mode = "candidates" if build else "rows"
        if kernels.is_stacked(weights):
            return [_Job(None, order)]
        if candidates is None or kernels.num_candidates(weights) is None or mode == "rows":
            # Which row goes where is decided here and not by the threads: a run can be repeated.
            count = max(1, min(self._workers, len(prompts) // _ROWS_PER_WORKER))
            return [_Job(None, order[first::count]) for first in range(count)]
        return [_Job(c, [i for i in order if candidates[i] == c]) for c in present]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
