"""The family's tokenizer: lossless, digits apart, and a chat template that marks what to learn."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cycleqd_jax.tasks.registry import TASKS
from cycleqd_jax.training.tokenizer import (
    ASSISTANT,
    END,
    PAD,
    USER,
    render_conversations,
    train_tokenizer,
)

SPECIAL = (END, PAD, USER, ASSISTANT)
SIZE = 400


def training_texts() -> list[str]:
    problems = [p for make in TASKS.values() for p in make().problems("train", 30)]
    return [text for p in problems for text in (p.prompt, p.document, *p.answers)]


TOKENIZER: Any = train_tokenizer(training_texts(), SIZE)

TEXT = st.text(st.characters(codec="utf-8"), max_size=40).filter(
    lambda text: not any(token in text for token in SPECIAL)
)


def encode(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


@settings(deadline=None, max_examples=150)
@given(TEXT)
@example(" two  spaces , a dot . and 's n't ?\r\n\tend ")
@example("naïve ﬁ e\u0301 日本語 🎉\u200d👩 \ufeff\x00 ١٢٣ ²½")
@example("def f(xs):\n    return [x for x in xs if x % 2 == 0]")
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(encode(text)) == text
    assert TOKENIZER.decode(encode(text), skip_special_tokens=True) == text


@settings(deadline=None, max_examples=50)
@given(st.from_regex(r"[0-9]{1,12}", fullmatch=True))
def test_digits_stay_apart(number: str) -> None:
    assert [TOKENIZER.decode([token]) for token in encode(number)] == list(number)


def test_no_token_joins_a_digit_with_anything() -> None:
    with_digit = [token for token in TOKENIZER.get_vocab() if any(c in "0123456789" for c in token)]
    assert sorted(with_digit) == list("0123456789")


def test_words_of_the_training_texts_are_shorter_than_their_letters() -> None:
    text = "return the sum of the numbers"
    assert len(encode(text)) < len(text) / 2


def test_the_vocabulary_has_the_size_that_was_asked_for() -> None:
    assert len(TOKENIZER) == SIZE
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(SIZE))


def test_special_tokens_are_one_token_with_its_own_duty() -> None:
    assert [len(encode(token)) for token in SPECIAL] == [1, 1, 1, 1]
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token) == (END, PAD)
    assert {TOKENIZER.eos_token_id, TOKENIZER.pad_token_id} == {encode(END)[0], encode(PAD)[0]}
    ids = encode(f"{USER}hi{ASSISTANT}yes{END}{PAD}")
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "hiyes"


def test_training_twice_gives_the_same_tokenizer() -> None:
    again = train_tokenizer(training_texts(), SIZE)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_a_saved_tokenizer_is_loaded_with_equal_ids(loaded: Any) -> None:
    texts = [*training_texts()[:50], "日本 🎉 12.5", " a b ", f"{USER}x{ASSISTANT}{END}"]
    assert loaded(texts)["input_ids"] == TOKENIZER(texts)["input_ids"]
    assert [loaded.decode(loaded(text)["input_ids"]) for text in texts] == texts
    assert (loaded.eos_token_id, loaded.pad_token_id) == (
        TOKENIZER.eos_token_id,
        TOKENIZER.pad_token_id,
    )


def test_a_saved_tokenizer_keeps_template_and_masks(loaded: Any) -> None:
    chats = [[("user", "hi 1"), ("assistant", "yes"), ("user", "é"), ("assistant", "no 23")]]
    assert loaded.chat_template == TOKENIZER.chat_template
    assert render_conversations(loaded, chats) == render_conversations(TOKENIZER, chats)


def test_the_chat_template_renders_roles_and_the_turn_to_speak() -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    question = [*chat, {"role": "user", "content": "c\n"}]
    render = TOKENIZER.apply_chat_template
    assert render(chat, tokenize=False) == f"{USER}a{ASSISTANT}b{END}"
    assert (
        render(question, tokenize=False, add_generation_prompt=True)
        == f"{USER}a{ASSISTANT}b{END}{USER}c\n{ASSISTANT}"
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
@example([("héllo 日本", "wörld 🎉é 日本 x"), ("", "")])
@example([("{{ x }}{% if %}", "{% generation %} {# no #}\n"), (" a ", "\n b \n")])
@example([("1", "🎉"), ("e\u0301", "\u0301")])
def test_the_mask_covers_the_assistant_s_words_and_end_token(turns: list[tuple[str, str]]) -> None:
    conversation = [
        (role, content)
        for pair in turns
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    ((ids, mask),) = render_conversations(TOKENIZER, [conversation])
    assert len(ids) == len(mask)
    spoken = [token for token, marked in zip(ids, mask, strict=True) if marked]
    rest = [token for token, marked in zip(ids, mask, strict=True) if not marked]
    assert TOKENIZER.decode(spoken) == "".join(answer + END for _, answer in turns)
    assert TOKENIZER.decode(rest) == "".join(USER + asked + ASSISTANT for asked, _ in turns)
    # One stretch an answer, each closed by the end token.
    runs = [
        [token for token, _ in run]
        for marked, run in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
        if marked
    ]
    assert [run[-1] for run in runs] == [TOKENIZER.eos_token_id] * len(turns)


@settings(deadline=None, max_examples=40)
@given(asked=TEXT, answer=TEXT)
def test_what_is_learned_follows_exactly_the_prompt_that_is_asked(asked: str, answer: str) -> None:
    prompt = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": asked}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    ((ids, mask),) = render_conversations(TOKENIZER, [[("user", asked), ("assistant", answer)]])
    assert ids[: len(prompt)] == prompt
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))


def test_a_question_without_an_answer_has_nothing_to_learn() -> None:
    rows = render_conversations(TOKENIZER, [[("user", "hi")], [("user", "a"), ("assistant", "b")]])
    assert [sum(mask) for _, mask in rows] == [0, 2]


def test_demonstrations_of_every_task_are_rendered_whole() -> None:
    for make in TASKS.values():
        for problem in make().problems("train", 10):
            ((ids, mask),) = render_conversations(TOKENIZER, [problem.demonstration])
            spoken = [token for token, marked in zip(ids, mask, strict=True) if marked]
            assert TOKENIZER.decode(spoken) == "".join(answer + END for answer in problem.answers)
