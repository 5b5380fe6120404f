"""Decoding of many prompts of many candidates, each row with its own candidate's weights.

A `talk.Talk` deals prompts to streams (`stream.Stream`): those of one call, or of conversations.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

import jax
import jax.numpy as jnp

from cycleqd_jax.models import kernels
from cycleqd_jax.models.cache import unstack_layers
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.programs import Placement, Programs
from cycleqd_jax.models.sampling import Sampling
from cycleqd_jax.models.specs import LlamaParams
from cycleqd_jax.models.stops import StopStrings
from cycleqd_jax.models.stream import Stream
from cycleqd_jax.models.talk import DecodeStats, Talk

# Processor time of rows over that of building each candidate, at width 128 with 96 prompts per
# candidate: 0.9 at a share of 0.27, 1.4 at 1.1, 2.6 at 4.3. The threshold lies between; it was not
# measured itself.
_ROWS_PER_CANDIDATE = 16
_DEAR_SPECTRAL_SHARE = 0.4

# Streams that a worker takes in turns: while one is decoded, others hear what follows their texts.
_IN_TURNS = 2

MAX_ROWS = 256
"""Rows of the largest batch, of one device."""

MODES = ("auto", "rows", "candidates")
GREEDY = Sampling()


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
    - "candidates": one candidate after the other, its W(g) built on the fly and dropped; where they
      converse, two a worker take turns. Fewest arithmetic operations once a candidate has more
      tokens than W has rows: right for a CPU.
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
        compile nothing. `on_finished` is called with the number of prompts done since its last
        call. Raises ValueError for an empty prompt, one that leaves no room for a token, candidates
        that do not exist, and less than one new token.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        heard: SimpleQueue[tuple[int, list[int]] | Exception] = SimpleQueue()
        left = len(prompts)
        with self.talk(
            lambda key, tokens: heard.put((key, tokens)),
            heard.put,
            params,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            stops=stops,
            keep=False,
        ) as talk:
            talk.ask(range(left), prompts, candidates, seeds)
            while left:
                batch = [heard.get(), *(heard.get() for _ in range(heard.qsize()))]
                for answer in batch:
                    if isinstance(answer, Exception):
                        raise answer
                    answers[answer[0]] = answer[1]
                    talk.end(answer[0])
                left -= len(batch)
                if on_finished is not None:
                    on_finished(len(batch))
        return answers

    def talk(
        self,
        answered: Callable[[Any, list[int]], None],
        failed: Callable[[Exception], None],
        params: LlamaParams | None = None,
        *,
        sampling: Sampling = GREEDY,
        max_new_tokens: int | None = None,
        stops: StopStrings | None = None,
        keep: bool = True,
    ) -> Talk:
        """Conversations with candidates, whose next texts are asked for at any time.

        Answers are those of `decode`, given to `answered` as soon as they are known; what a
        conversation said and was told before is not read again, if it goes on soon. Without `keep`
        no places of a batch are kept for that. In bfloat16, answers that go on so may differ from
        those whose whole prompt is read: whether they do depends on time.
        """
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(
                f"Decoder: expected max_new_tokens of at least 1, got {max_new_tokens}"
            )
        weights = self._weights(params)

        def open_stream(candidate: int | None) -> Stream:
            chosen = weights
            if candidate is not None:
                chosen = self._programs.build(weights, jnp.int32(candidate))
            return self._stream(chosen, sampling, max_new_tokens, stops, keep=keep)

        return Talk(
            weights,
            self.config.max_positions,
            choose=partial(self._builds, weights),
            open_stream=open_stream,
            workers=1 if kernels.is_stacked(weights) else self._workers,
            in_turns=_IN_TURNS if keep else 1,
            answered=answered,
            failed=failed,
            closed=self._count,
        )

    def _count(self, stats: DecodeStats) -> None:
        self.stats += stats

    def open(
        self,
        params: LlamaParams | None = None,
        *,
        sampling: Sampling = GREEDY,
        keep: bool = False,
    ) -> Stream:
        """A live batch to which prompts are submitted at any time, on the calling thread.

        With `keep` a text may go on from one that has just ended (`Stream.submit`).
        """
        return self._stream(self._weights(params), sampling, keep=keep)

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
        *,
        keep: bool,
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
            keep=keep,
        )

    def _builds(
        self,
        weights: LlamaParams,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[int] | None,
    ) -> bool:
        """Whether the candidates of these prompts are built one after the other."""
        if candidates is None or kernels.num_candidates(weights) is None:
            return False
        if kernels.is_stacked(weights) or self._mode == "rows":
            return False
        if self._mode == "candidates":
            return True
        enough = len(prompts) >= _ROWS_PER_CANDIDATE * len(set(candidates))
        dear = kernels.spectral_share(weights) > _DEAR_SPECTRAL_SHARE
        return jax.default_backend() == "cpu" and enough and dear


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
