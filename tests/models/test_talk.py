"""Conversations that threads decode: the same answers as `Decoder.decode`, errors, and the end."""

import gc
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from cycleqd_jax.models import kernels
from cycleqd_jax.models.config import LlamaConfig
from cycleqd_jax.models.generate import Decoder
from cycleqd_jax.models.talk import Talk

CONFIG = LlamaConfig(48, 16, 24, 2, 4, 2, 4, max_positions=96)
CANDIDATES = 6


@pytest.fixture(scope="module")
def attached(make_params: Callable[..., Any], make_population: Callable[..., Any]) -> Any:
    population = make_population(CONFIG, (2, 2), CANDIDATES, 0.2)
    return kernels.attach(make_params(CONFIG, scale=3.0), *population)


def decoder(attached: Any, **options: Any) -> Decoder:
    return Decoder(
        attached, CONFIG, stop_tokens=[1, 2], pad_token=0, max_new_tokens=12, workers=2, **options
    )


def fail(error: Exception) -> None:
    raise error


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(4, 48, rng.integers(1, 16)).tolist() for _ in range(count)]


@pytest.mark.parametrize("mode", ["rows", "candidates"])
def test_conversations_hear_what_decoding_gives(attached: Any, mode: str) -> None:
    engine = decoder(attached, mode=mode)
    questions = prompts(80)
    candidates = [i % CANDIDATES for i in range(80)]
    heard: SimpleQueue[tuple[int, list[int]]] = SimpleQueue()
    asked = {i: [question] for i, question in enumerate(questions)}
    answers: dict[int, list[list[int]]] = {i: [] for i in asked}
    before = engine.stats
    with engine.talk(lambda i, tokens: heard.put((i, tokens)), fail) as talk:
        # The second half begins to speak while the first does.
        for first in (0, 40):
            rows = range(first, first + 40)
            talk.ask(rows, questions[first : first + 40], [candidates[i] for i in rows])
        left = 3 * 80
        while left:
            i, tokens = heard.get(timeout=60)
            answers[i].append(tokens)
            left -= 1
            if len(answers[i]) < 3:
                asked[i].append([*asked[i][-1], *tokens, 4 + i % 40])
                talk.ask([i], [asked[i][-1]], [candidates[i]])
            else:
                talk.end(i)
        # Weights and caches of streams that nobody speaks in are let go.
        until = time.monotonic() + 10
        while any(seat.stream is not None for seat in talk._seats.values()):
            assert time.monotonic() < until
            time.sleep(0.01)
        assert len(talk._seats) == (2 if mode == "rows" else CANDIDATES)
    for turn in range(3):
        whole = engine.decode([asked[i][turn] for i in range(80)], candidates)
        assert whole == [answers[i][turn] for i in range(80)]
    stats = engine.stats
    assert stats.prompts - before.prompts == 6 * 80
    generated = sum(len(text) for texts in answers.values() for text in texts)
    assert stats.generated_tokens - before.generated_tokens == 2 * generated
    assert stats.seconds > before.seconds


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Callable[[Decoder], dict[str, int]]:
    def watch(engine: Decoder) -> dict[str, int]:
        """How many built candidates are alive, and were at most."""
        counts = {"alive": 0, "most": 0, "all": 0}
        build = engine._programs.build

        def gone() -> None:
            counts["alive"] -= 1

        def counted(weights: Any, candidate: Any) -> Any:
            model = build(weights, candidate)
            weakref.finalize(model.final_norm, gone)
            counts["alive"] += 1
            counts["all"] += 1
            counts["most"] = max(counts["most"], counts["alive"])
            return model

        monkeypatch.setattr(engine._programs, "build", counted)
        return counts

    return watch


def test_candidates_are_built_one_after_the_other(
    attached: Any, built: Callable[[Decoder], dict[str, int]]
) -> None:
    engine = decoder(attached, mode="candidates")
    counts = built(engine)
    engine.decode(prompts(60), [i % CANDIDATES for i in range(60)])
    # Two workers, each with one, and one that is being let go.
    assert counts["most"] <= 3
    gc.collect()
    assert counts["alive"] == 0
    assert counts["all"] == CANDIDATES


def test_candidates_that_wait_long_make_room_and_are_built_again(
    attached: Any, built: Callable[[Decoder], dict[str, int]]
) -> None:
    engine = decoder(attached, mode="candidates")
    counts = built(engine)
    questions, candidates = prompts(36), [i % CANDIDATES for i in range(36)]
    heard: SimpleQueue[tuple[int, list[int]]] = SimpleQueue()
    with engine.talk(lambda i, tokens: heard.put((i, tokens)), fail) as talk:
        talk.ask(range(36), questions, candidates)
        answers = dict(heard.get(timeout=60) for _ in range(36))
        # All have said something before anybody goes on.
        follows = [[*question, *answers[i], 7] for i, question in enumerate(questions)]
        talk.ask(range(36), follows, candidates)
        again = dict(heard.get(timeout=60) for _ in range(36))
    assert counts["most"] <= 2 * 2 + 1
    assert CANDIDATES < counts["all"] <= 2 * CANDIDATES
    assert [again[i] for i in range(36)] == engine.decode(follows, candidates)


def test_a_conversation_can_end_before_it_is_answered(attached: Any) -> None:
    engine = decoder(attached)
    heard: SimpleQueue[tuple[int, list[int]]] = SimpleQueue()
    with engine.talk(lambda i, tokens: heard.put((i, tokens)), fail) as talk:
        for i in range(50):
            talk.ask([i], [[5, 6, 4 + i % 40]], [0])
            if i % 2:
                talk.end(i)
        seen: set[int] = set()
        while not seen >= set(range(0, 50, 2)):
            seen.add(heard.get(timeout=60)[0])
        with pytest.raises(ValueError, match="its conversation's candidate 0, found 1"):
            talk.ask([0], [[5]], [1])
    with pytest.raises(RuntimeError, match="expected to be open"):
        talk.ask([99], [[5]], [0])


def test_an_answer_that_nobody_can_take_is_a_failure(attached: Any) -> None:
    failures: SimpleQueue[Exception] = SimpleQueue()

    def broken(key: int, tokens: list[int]) -> None:
        raise OSError("no room")

    with decoder(attached).talk(broken, failures.put) as talk:
        talk.ask([0], [[5, 6]], [0])
        assert str(failures.get(timeout=60)) == "no room"


def test_what_goes_wrong_in_a_thread_is_told(
    attached: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = decoder(attached)
    failures: SimpleQueue[Exception] = SimpleQueue()

    def fails(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine._programs, "chunk", fails)
    with engine.talk(lambda i, tokens: None, failures.put) as talk:
        talk.ask([0], [[5, 6]], [0])
        assert str(failures.get(timeout=60)) == "no memory"
    with pytest.raises(RuntimeError, match="no memory"):
        engine.decode([[5, 6]], [0])


def test_a_talk_can_be_closed_while_it_speaks(attached: Any) -> None:
    engine = decoder(attached)
    before = threading.active_count()
    heard: list[int] = []
    talk = engine.talk(lambda i, tokens: heard.append(i), fail)
    talk.ask(range(200), prompts(200), [0] * 200)
    talk.close()
    assert threading.active_count() == before
    assert len(heard) < 200
    assert engine.stats.seconds > 0.0
    stats = engine.stats
    talk.close()
    assert engine.stats == stats


def test_bad_prompts_are_refused_at_once(attached: Any) -> None:
    def no_talk() -> Talk:
        return decoder(attached).talk(lambda i, tokens: None, fail)

    with no_talk() as talk:
        with pytest.raises(ValueError, match="prompt 0: expected 1 to 95 tokens"):
            talk.ask([0], [[]], [0])
        with pytest.raises(ValueError, match=r"expected a candidate in \[0, 6\), found 6"):
            talk.ask([0], [[5]], [6])
        talk.ask([], [], [])
    with pytest.raises(ValueError, match="max_new_tokens of at least 1, got 0"):
        decoder(attached).talk(lambda i, tokens: None, fail, max_new_tokens=0)
