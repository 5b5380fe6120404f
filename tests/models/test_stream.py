import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cycleqd_jax.models import kernels
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.generate import Decoder
from cycleqd_jax.models.programs import STEPS
from cycleqd_jax.models.sampling import Sampling
from cycleqd_jax.models.specs import roles
from cycleqd_jax.models.stream import Stream

CONFIG = LlamaConfig(48, 16, 24, 2, 4, 2, 4, max_positions=96)


def prompts(count: int, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(4, 48, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


SLIDING = dataclasses.replace(CONFIG, architecture="mistral", sliding_window=7)


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


def converse(
    engine: Decoder, turns: list[list[list[int]]], **options: Any
) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """Conversations in one stream: the prompts of every turn, and the answers.

    `turns` has what is said to conversation i in turn t; a conversation goes on as soon as it can.
    """
    stream = engine.open(keep=True, **options)
    count = len(turns[0])
    prompts_of = [[list(said)] for said in turns[0]]
    answers: list[list[list[int]]] = [[] for _ in range(count)]
    who = dict(zip(stream.submit(turns[0], seeds=range(count)), range(count), strict=True))
    while stream.pending:
        for answer in stream.step():
            i = who[answer.ticket]
            answers[i].append(answer.tokens)
            if len(answers[i]) < len(turns):
                said = turns[len(answers[i])][i]
                prompts_of[i].append([*prompts_of[i][-1], *answer.tokens, *said])
                [ticket] = stream.submit([prompts_of[i][-1]], seeds=[i], after=[answer.ticket])
                who[ticket] = i
            else:
                stream.forget(answer.ticket)
    return prompts_of, answers


def test_conversations_look_through_their_window(make_params: Callable[..., Any]) -> None:
    engine = Decoder(
        make_params(SLIDING, scale=3.0),
        SLIDING,
        stop_tokens=[1],
        pad_token=0,
        max_new_tokens=14,
        max_rows=8,
        workers=1,
    )
    rng = np.random.default_rng(6)
    said = [[rng.integers(4, 48, most).tolist() for _ in range(10)] for most in (16, 3, 5)]
    asked, answers = converse(engine, said)
    for t in range(3):
        assert engine.decode([a[t] for a in asked]) == [a[t] for a in answers]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_conversations_go_on_as_if_they_were_read_anew(
    engine: Decoder, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature)
    rng = np.random.default_rng(4)
    # Short and long ones, of fewer and of more tokens than a chunk has steps.
    said = [
        [rng.integers(4, 48, rng.integers(1, most)).tolist() for _ in range(21)]
        for most in (20, 4, 14)
    ]
    entered: list[int] = []
    enter = engine._programs.enter

    def watched(weights: Any, entering: Any, *rest: Any) -> Any:
        entered.append(int((entering.left > 0).sum()))
        return enter(weights, entering, *rest)

    monkeypatch.setattr(engine._programs, "enter", watched)
    asked, answers = converse(engine, said, sampling=sampling)
    # Two thirds of all texts go on from others; those that are mostly new are read whole.
    assert 21 <= sum(entered) < 21 + 14
    for t in range(3):
        anew = engine.decode([a[t] for a in asked], sampling=sampling, seeds=range(21))
        assert anew == [a[t] for a in answers]
    assert len({len(answer) for a in answers for answer in a}) > 4


def test_what_was_not_said_is_forgotten(engine: Decoder) -> None:
    stream = engine.open(keep=True)
    question = prompts(1, longest=30)[0] * 2
    [ticket] = stream.submit([question])
    said = drain(stream)[ticket]
    assert len(said) > 2
    # The next prompt has another answer, and less of the question.
    for changed in ([*question, said[0], 9, 9, 10], question[:-2], question):
        [ticket] = stream.submit([changed], after=[ticket])
        assert drain(stream) == {ticket: engine.decode([changed])[0]}


def test_a_place_is_not_kept_for_ever(engine: Decoder) -> None:
    stream = engine.open(keep=True)
    questions = prompts(8)
    first = stream.submit(questions)[0]
    answer = drain(stream)[first]
    stream.submit(prompts(30))
    drain(stream)
    assert stream._pasts.get(first) is None
    follows = [*questions[0], *answer, 5]
    [ticket] = stream.submit([follows], after=[first])
    assert drain(stream) == {ticket: engine.decode([follows])[0]}


def test_long_conversations_do_not_take_more_slots_than_their_text(engine: Decoder) -> None:
    stream = engine.open(keep=True)
    texts = [[4 + i] for i in range(4)]
    tickets: list[Any] = [None] * 4
    most = 0
    while max(map(len, texts)) < 70:
        tickets = stream.submit(texts, after=tickets)
        found: dict[int, list[int]] = {}
        while stream.pending:
            found |= {answer.ticket: answer.tokens for answer in stream.step()}
            most = max(most, stream._table.slots)
        # One token each, for most of what a turn's slots are is not the text's.
        texts = [[*text, 5 + len(text) % 30] for text in texts]
        for text, ticket in zip(texts, tickets, strict=True):
            assert found[ticket] == engine.decode([text[:-1]])[0]
    assert most <= 160


@pytest.mark.parametrize("stacked", [False, True])
def test_a_text_goes_on_with_its_own_candidate(
    make_params: Callable[..., Any], make_population: Callable[..., Any], stacked: bool
) -> None:
    base = make_params(CONFIG, scale=3.0)
    attached = kernels.attach(base, *make_population(CONFIG, (2, 2), 3, 0.2))
    if stacked:
        models = [kernels.materialise_candidate(attached, jnp.int32(c)) for c in range(3)]
        attached = kernels.stack(models, roles(CONFIG))
    engine = Decoder(attached, CONFIG, stop_tokens=[1], pad_token=0, max_new_tokens=8)
    stream = engine.open(keep=True)
    questions, candidates = prompts(6, longest=9), [0, 1, 2, 2, 0, 1]
    tickets = stream.submit(questions, candidates)
    found = drain(stream)
    follows = [[*q, *found[ticket], 8, 9] for q, ticket in zip(questions, tickets, strict=True)]
    again = stream.submit(follows, candidates, after=tickets)
    assert not any(stream._waiting)
    answers = drain(stream)
    assert [answers[ticket] for ticket in again] == engine.decode(follows, candidates)
    with pytest.raises(ValueError, match="go on with its candidate 0, found 1"):
        stream.submit([follows[0]], [1], after=[again[0]])


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
