"""Finding the program in what a model said."""

import pytest

from cycleqd_jax.tasks.programs.answers import defines, find_program

CODE = "def f(x):\n    return x + 1"

ANSWERS = {
    "raw": CODE,
    "a block": f"Sure!\n```python\n{CODE}\n```\nIt adds one.",
    "a block without a language": f"```\n{CODE}\n```",
    "an indented block": f"1. Code:\n  ```python\n{CODE}\n  ```",
    "a block that never ends": f"Sure!\n```python\n{CODE}\n",
    "Windows lines": f"```python\r\n{CODE}\r\n```".replace("\n", "\r\n"),
    "the second block": f"Install it:\n```bash\npip install x\n```\n```python\n{CODE}\n```",
    "words around bare code": f"Here is the function:\n{CODE}\nHope this helps!",
    "MBPP's markers": f"[BEGIN]\n{CODE}\n[DONE]",
    "cut off in the next function": f"```python\n{CODE}\n\ndef g(x):\n    return (x +",
    "another definition first": f"```python\ny = 1\n```\n```python\n{CODE}\n```",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=list(ANSWERS))
def test_the_program_is_found(answer: str) -> None:
    space: dict[str, object] = {}
    exec(find_program(answer, "f"), space)
    assert space["f"](1) == 2  # type: ignore[operator]


def test_what_is_no_definition_is_taken_away() -> None:
    program = (
        'print("ü"); import math\nN = math.pi\nassert f(0) == 3, """a\nb"""\n'
        "table = {}\nfor i in range(3):\n    table[i] = i\n"
        "@staticmethod\ndef f(x):\n    assert x\n    print(x)\n    return x\n"
        'if __name__ == "__main__":\n    f(0)\nf(0)\n'
    )
    assert find_program(program, "f") == (
        "pass; import math\nN = math.pi\npass\n"
        "table = {}\nfor i in range(3):\n    table[i] = i\n"
        "@staticmethod\ndef f(x):\n    assert x\n    print(x)\n    return x\n"
        "pass\npass\n"
    )


def test_a_stub_may_be_continued() -> None:
    stub = 'def f(x):\n    """Add."""\n'
    for answer in ("    return x + 1\n", "```python\n    return x + 1\n```"):
        space: dict[str, object] = {}
        exec(find_program(answer, "f", stub), space)
        assert space["f"](1) == 2  # type: ignore[operator]


@pytest.mark.parametrize(
    "answer",
    ["", "I cannot.", "```python\n```", "def g(): pass", "(" * 5000, "-" * 50_000 + "1", "\0def f",
     "```\n" * 2000, "x = \\\n" * 3000, "é" * 3000, "def f(x):"],
)  # fmt: skip
def test_an_answer_without_the_function_stays_what_it_is(answer: str) -> None:
    assert find_program(answer, "f") == answer


def test_odd_escapes_warn_nobody() -> None:
    code = 'def f(x):\n    return "\\d"'
    assert find_program(code, "f") == code


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("def f(): pass", True),
        ("class f: pass", True),
        ("f = len", True),
        ("from math import sqrt as f", True),
        ("try:\n    from a import f\nexcept ImportError:\n    pass", True),
        ("def g():\n    def f(): pass", False),
        ("g = f", False),
        ("def f(", False),
    ],
)
def test_defining_is_binding_at_the_top(program: str, expected: bool) -> None:
    assert defines(program, "f") is expected
