"""The action format of AgentBench v0.2, against the regular expressions that define it."""

import re

from hypothesis import given
from hypothesis import strategies as st

from cycleqd_jax.tasks.dbbench import prompt

PIECES = st.lists(
    st.sampled_from(
        ["Action: ", "Operation", "Answer", "\n", "```sql\n", "\n```", "```", "Final Answer:",
         "\nFinal Answer:", "SELECT 1;", ' ["a"]', " ", "x", "\r"]
    ),
    max_size=12,
).map("".join)  # fmt: skip


@given(PIECES)
def test_turns_are_understood_as_the_original_does(text: str) -> None:
    action = re.search(r"Action: (.*?)\n", text)
    assert prompt.wants_operation(text) == bool(action and action[1] == "Operation")
    block = re.search(r"```sql\n([\s\S]*?)\n```", text)
    assert prompt.find_statement(text) == (block and block[1].strip().replace("\n", " "))
    answer = re.search(r"\nFinal Answer:(.*)", text)
    assert prompt.find_answer(text) == (answer and answer[1])


def test_an_ideal_agent_is_understood() -> None:
    text = prompt.write_operation("SELECT 'a'")
    assert prompt.wants_operation(text)
    assert prompt.find_statement(text) == "SELECT 'a'"
    text = prompt.write_answer(("a", "it's"))
    assert not prompt.wants_operation(text)
    assert prompt.find_answer(text) == """ ['a', "it's"]"""


def test_the_conversation_opens_with_the_instruction() -> None:
    first, second, third = prompt.opening("Who?\nThe table.")
    assert [m.role for m in (first, second, third)] == ["user", "assistant", "user"]
    assert first.content.startswith("\nI will ask you a question, then you should help me operate")
    assert first.content.endswith("you have to deal with it by yourself.\n")
    assert (second.content, third.content) == ("Ok.", "Who?\nThe table.")


def test_a_long_reply_is_cut() -> None:
    assert prompt.cut_reply("x" * 800) == "x" * 800
    assert prompt.cut_reply("x" * 801) == "x" * 800 + "[TRUNCATED]"
