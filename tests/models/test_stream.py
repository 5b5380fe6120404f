from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.generate import Decoder
from cycleqd_jax.models.programs import STEPS
from cycleqd_jax.models.stream import Stream

CONFIG = LlamaConfig(48, 16, 24, 2, 4, 2, 4, max_positions=96)


def prompts(count: int, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(4, 48, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def engine(make_params: Callable[..., Any]) -> Decoder:
    return Decoder(
        make_params(CONFIG, scale=3.0),
        CONFIG,
        stop_tokens=[1, 2, 3],
        pad_token=0,
        max_new_tokens=24,
        max_rows=8,
        workers=1,
    )


def drain(stream: Stream) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    while stream.pending:
        found |= {answer.ticket: answer.tokens for answer in stream.step()}
    return found


def test_rows_that_enter_later_get_the_same_answers(engine: Decoder) -> None:
    questions = prompts(21)
    expected = [engine.decode([question])[0] for question in questions]
    stream = engine.open()
    tickets = stream.submit(questions[:6])
    found: dict[int, list[int]] = {}
    for question in questions[6:]:
        found |= {answer.ticket: answer.tokens for answer in stream.step()}
        tickets += stream.submit([question])
    found |= drain(stream)
    assert [found[ticket] for ticket in tickets] == expected
    assert len({len(answer) for answer in expected}) > 4
    assert stream.pending == 0
    assert stream.step() == []


def test_a_place_is_taken_by_the_next_row_while_others_go_on(engine: Decoder) -> None:
    stream = engine.open()
    questions = prompts(60)
    stream.submit(questions)
    steps, together = 0, []
    while stream.pending:
        stream.step()
        steps += 1
        together.append(sum(request is not None for request in stream._places))
    assert max(together) <= 8
    lengths = [len(answer) for answer in engine.decode(questions)]
    batches = [lengths[i : i + 8] for i in range(0, 60, 8)]
    # Batches that wait for their last row.
    assert steps < sum(-(-max(batch) // STEPS) for batch in batches)


def test_slots_are_used_again(engine: Decoder) -> None:
    stream = engine.open()
    stream.submit(prompts(60, longest=14))
    most = 0
    while stream.pending:
        stream.step()
        most = max(most, stream._table.slots)
    # A prompt of 16 slots, 24 tokens, a chunk that is begun: more rows do not take more.
    assert most <= 64


def test_long_and_short_rows_are_prefilled_apart(
    engine: Decoder, make_params: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 64 rows of at most 30 tokens would fill 2048: two blocks, none as wide as all need.
    questions = [[5, 6, 7 + i] for i in range(32)] + [q * 10 for q in ([5, 6, 7], [8, 9, 4]) * 16]
    wide = Decoder(
        make_params(CONFIG, scale=3.0),
        CONFIG,
        stop_tokens=[1, 2, 3],
        pad_token=0,
        max_new_tokens=24,
        max_rows=64,
        workers=1,
    )
    shapes: list[tuple[int, ...]] = []
    enter = wide._programs.enter

    def watched(weights: Any, entering: Any, *rest: Any) -> Any:
        shapes.append(entering.tokens.shape)
        return enter(weights, entering, *rest)

    monkeypatch.setattr(wide._programs, "enter", watched)
    stream = wide.open()
    tickets = stream.submit(questions)
    found = drain(stream)
    assert shapes == [(32, 32), (32, 8)]
    assert [found[ticket] for ticket in tickets] == engine.decode(questions)


def test_tickets_are_distinct(engine: Decoder) -> None:
    stream = engine.open()
    tickets = stream.submit(prompts(3)) + stream.submit(prompts(3))
    assert len(set(tickets)) == 6
    assert sorted(drain(stream)) == sorted(tickets)


@pytest.mark.slow
def test_a_stream_compiles_a_handful_of_programs(make_params: Callable[..., Any]) -> None:
    fresh = Decoder(
        make_params(CONFIG), CONFIG, stop_tokens=[1], pad_token=0, max_new_tokens=16, max_rows=8
    )
    stream = fresh.open()
    for question in prompts(40):
        stream.submit([question])
        stream.step()
    drain(stream)
    before = fresh.traces
    assert before <= 24
    stream = fresh.open()
    for question in prompts(40):
        stream.submit([question])
        stream.step()
    drain(stream)
    assert fresh.traces == before
