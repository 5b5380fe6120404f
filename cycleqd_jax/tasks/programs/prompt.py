"""What a model reads, as in each benchmark's published evaluation."""

from typing import Literal

from cycleqd_jax.tasks.base import Message
from cycleqd_jax.tasks.programs.records import Inputs, Record

Style = Literal["published", "paper"]

# Word for word: scores are comparable only under the same prompt.
# MBPP: Austin et al. 2021 (arXiv 2108.07732), figure 1, without its examples.
_MBPP = (
    "You are an expert Python programmer, and here is your task: {text} "
    "Your code should pass these tests:\n\n{tests}\n"
)
_MBPP_TESTS = 3
# EvalPlus 0.3.1, evalplus/codegen.py and provider/utility.py (Apache-2.0). There the model's answer
# is begun for it ("Below is a Python script …"); here it says all of it.
_EVALPLUS = (
    "Please provide a self-contained Python script that solves the following problem "
    "in a markdown code block:\n```\n{text}\n```\n"
)
# CycleQD's coding task on MBPP+ (its tasks/mbpp.py and its fishfarm's evalplus data).
_PAPER_SYSTEM = (
    "You are an exceptionally intelligent coding assistant that consistently delivers accurate "
    "and reliable responses to user instructions."
)
_PAPER = "{text} Your code should satisfy the following assertion:\n```python\n{tests}\n```"


def opening(record: Record, style: Style = "published") -> tuple[Message, ...]:
    """The conversation before the model's one turn.

    Args:
        record: the problem.
        style: "published", as the benchmark's authors ask (HumanEval as EvalPlus does, whose prompt
            is for models that chat); "paper", as CycleQD asks, of MBPP+ only.

    Raises:
        ValueError: CycleQD's prompt for another benchmark than MBPP+.
    """
    if style == "paper":
        text, tests = _split_docstring(record)
        asked = _PAPER.format(text=text, tests=tests)
        return (Message("system", _PAPER_SYSTEM), Message("user", asked))
    if record.family == "mbpp" and not isinstance(record.tests, Inputs):
        tests = "\n".join(record.asserts[:_MBPP_TESTS])
        return (Message("user", _MBPP.format(text=record.text, tests=tests)),)
    return (Message("user", _EVALPLUS.format(text=record.text.strip())),)


def write_answer(record: Record) -> str:
    """What an ideal model says."""
    return f"```python\n{record.reference.strip()}\n```"


def _split_docstring(record: Record) -> tuple[str, str]:
    _, quotes, inside = record.text.partition('"""')
    text, found, tests = inside.rpartition('"""')[0].partition("assert")
    if record.family != "mbpp" or not quotes or not found:
        raise ValueError(f"{record.id}: expected MBPP+'s prompt, a docstring with an assert in it")
    text = text.strip()
    return text if text.endswith(".") else text + ".", (found + tests).strip()
