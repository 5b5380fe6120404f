"""The judge of the coding skill against honest, wrong and crooked programs."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cycleqd_jax.sandbox import Sandbox
from cycleqd_jax.tasks.coding import CodingProblem, CodingTask, strip_fence

TASK = CodingTask()
GOOD = "def total(xs):\n    return sum(x for x in xs if x % 2 == 0)"
CASES: tuple[tuple[list[int], int], ...] = (([], 0), ([1, 2, 3, 4], 6), ([-2, 5, 9], -2), ([7], 0))


def make(function: str, cases: Any = CASES) -> CodingProblem:
    return CodingProblem(
        prompt=f"Write a function {function}.",
        answers=("",),
        solution="",
        document="",
        kind="test",
        function=function,
        calls=tuple((xs,) for xs, _ in cases),
        expected=tuple(result for _, result in cases),
    )


PROBLEM = make("total")

RIGHT = {
    "plain": GOOD,
    "fenced": f"```python\n{GOOD}\n```",
    "fenced among words": f"Here it is:\n```python\n{GOOD}\n```\nIt adds them up.",
    "prints as well": f"print('[1, 2]')\n{GOOD.replace('return', 'print(xs); return')}",
    "helper and import": f"import math\ndef even(x):\n    return math.fmod(x, 2) == 0\n{GOOD}",
    "lambda": "total = lambda xs: sum(x for x in xs if not x % 2)",
    "main guard is not main": f"{GOOD}\nif __name__ == '__main__':\n    raise SystemExit(1)",
    "changes its argument": "def total(xs):\n    xs.append(4)\n    "
    "return sum(x for x in xs if x % 2 == 0) - 4",
}

WRONG = {
    "off by one": "def total(xs):\n    return sum(x for x in xs[1:] if x % 2 == 0)",
    "one case only": "def total(xs):\n    return 6",
    "prints instead of returning": GOOD.replace("return ", "print(") + ")",
    "another name": GOOD.replace("total", "totals"),
    "not a function": "total = 6",
    "returns text": GOOD.replace("return ", "return str(") + ")",
    "returns a float": GOOD.replace("return ", "return float(") + ")",
    "returns a list": GOOD.replace("sum(", "list("),
    "returns the function": "def total(xs):\n    return total",
    "two arguments": GOOD.replace("(xs)", "(xs, start)"),
    "fails on the empty list": GOOD.replace("return", "xs[0]; return"),
    "syntax error": "def total(xs)\n    return 0",
    "nothing": "",
    "words only": "I cannot write this function.",
    "leaves at import": f"{GOOD}\nimport sys\nsys.exit(0)",
    "leaves at the call": "import sys\ndef total(xs):\n    sys.exit(0)",
    "exits hard": f"{GOOD}\nimport os\nos._exit(0)",
    "fails after its results": f"{GOOD}\nimport atexit, os\natexit.register(os._exit, 3)",
    "kills its parent": f"{GOOD}\nimport os\nos.kill(os.getppid(), 9)\nos.abort()",
}

CROOKED = {
    "prints forged results": "print([0] * 4)\nimport os\nos.write(1, b'[0, 0, 0, 0]')\nos._exit(0)",
    "adds to the results": f"{GOOD}\nimport atexit, os\natexit.register(os.write, 1, b'1')",
    "writes before the results": f"import os\nos.write(1, b'[]')\n{GOOD}",
    "patches json.dump": "import json\njson.dump = lambda value, file: file.write('true')\n"
    "def total(xs):\n    return 0",
    "patches json.dump to call it equal": "import json\n"
    "json.dump = lambda value, file: file.write('[NaN, NaN, NaN, NaN]')\n"
    "def total(xs):\n    return 0",
    "equal to everything": "class Same(int):\n    def __eq__(self, other):\n        return True\n"
    "def total(xs):\n    return Same()",
    "equal to everything in a list": "class Same(list):\n    def __eq__(self, other):\n"
    "        return True\ndef total(xs):\n    return Same()",
    "asks standard input again": "import sys\nsys.stdin.seek(0)\n"
    "def total(xs):\n    return sys.stdin.read()",
    "takes the harness's list": "import __main__\n__main__.results = list(range(99))\n"
    "def total(xs):\n    __main__.results.clear()\n    return 0",
    "shortens the tests": "import __main__\n__main__.task['calls'].clear()\n"
    "def total(xs):\n    return 0",
    "patches sorted and isinstance": "import builtins\nbuiltins.isinstance = lambda *a: True\n"
    "builtins.sorted = lambda x: 6\ndef total(xs):\n    return 6",
    "answers with no JSON": "import os\nos.write(1, b'\\xff\\xfe{')\nos._exit(0)",
    "answers with a deep nest": "import os\nos.write(1, b'[' * 60000)\nos._exit(0)",
    "answers with a long number": "import os\nos.write(1, b'[' + b'9' * 6000 + b']')\nos._exit(0)",
    "answers with a huge number": "def total(xs):\n    return 10 ** 4000",
}

# Looks wherever the harness may have left a number of which it knows only a fingerprint.
SEARCH = """
import gc, os, re, sys
def seen():
    yield from (repr(thing) for thing in gc.get_objects() if type(thing) in (list, dict, tuple))
    frame = sys._getframe()
    while frame:
        yield repr((frame.f_locals, frame.f_globals))
        frame = frame.f_back
    sys.stdin.seek(0)
    yield sys.stdin.read()
    for path in ("/proc/self/environ", "/proc/self/cmdline", "/proc/self/mem"):
        try:
            yield open(path, "rb").read().decode("latin-1")
        except OSError:
            pass
    for folder, _, names in os.walk("."):
        for name in names:
            yield open(os.path.join(folder, name)).read()
def total(xs):
    for text in seen():
        for digits in re.findall("[0-9]{9}", text):
            if pow(int(digits), 3, 1000000007) == FINGERPRINT:
                return int(digits)
    return 0
"""
SECRET = 918273645
SEARCH = SEARCH.replace("FINGERPRINT", str(pow(SECRET, 3, 1000000007)))


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_score_one(name, score):
    assert score(TASK, PROBLEM, [(RIGHT[name],)]) == [1.0]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_programs_score_zero(name, score):
    assert score(TASK, PROBLEM, [(WRONG[name],)]) == [0.0]


@pytest.mark.parametrize("name", CROOKED)
def test_crooked_programs_score_zero(name, score):
    assert score(TASK, PROBLEM, [(CROOKED[name],)]) == [0.0]


def test_the_expected_values_are_nowhere_to_be_found(score):
    assert score(TASK, make("total", (([1], SECRET),)), [(SEARCH,)]) == [0.0]


def test_the_search_for_expected_values_finds_what_is_there(score):
    # The control of the test above: as an argument the number is in the sandbox.
    assert score(TASK, make("total", (([SECRET], SECRET),)), [(SEARCH,)]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        "while True:\n    pass",
        "def total(xs):\n    while True:\n        pass",
        "import time\ntime.sleep(9)",
    ],
)
def test_endless_programs_score_zero(text: str, score: Any, hasty: Sandbox) -> None:
    assert score(TASK, PROBLEM, [(text,)], hasty) == [0.0]


def test_one_program_cannot_spoil_the_next_ones(score):
    vandal = (
        "import builtins, json\nbuiltins.sum = lambda x: 0\njson.load = None\n" + WRONG["nothing"]
    )
    attempts = [(vandal,), (GOOD,)] * 8
    assert score(TASK, PROBLEM, attempts) == [0.0, 1.0] * 8


@pytest.mark.parametrize("result", ["[2, 1, 2]", "(2, 1, 2)"])
def test_lists_are_compared_in_order(result: str, score: Any) -> None:
    program = f"def pick(xs):\n    return {result}"
    assert score(TASK, make("pick", (([], [2, 1, 2]),)), [(program,)]) == [1.0]
    assert score(TASK, make("pick", (([], [1, 2, 2]),)), [(program,)]) == [0.0]


def test_a_set_is_a_set_and_no_list(score):
    programs = [("def pick(xs):\n    return set(xs)",), ("def pick(xs):\n    return [1, 9, 30]",)]
    assert score(TASK, make("pick", (([9, 1, 30, 1], {"set": [1, 9, 30]}),)), programs) == [
        1.0,
        0.0,
    ]
    assert score(TASK, make("pick", (([9, 1, 30, 1], [1, 9, 30]),)), programs) == [0.0, 1.0]


@pytest.mark.parametrize(("result", "other"), [(1, True), (0, False), (2, 2.0), ([1], [True])])
def test_values_of_another_type_are_not_equal(result: Any, other: Any, score: Any) -> None:
    programs = [(f"def pick(xs):\n    return {value!r}",) for value in (result, other)]
    assert score(TASK, make("pick", (([], result),)), programs) == [1.0, 0.0]


CODE = st.text(st.characters(codec="utf-8", exclude_characters="`\r"), max_size=60)


@settings(deadline=None)
@given(CODE)
def test_text_without_a_fence_is_left_alone(code: str) -> None:
    assert strip_fence(code) == code


@settings(deadline=None)
@given(
    code=CODE,
    language=st.sampled_from(["", "python", "py3", "sql", "bash"]),
    before=CODE,
    after=CODE,
    closed=st.booleans(),
)
def test_a_fence_gives_its_inside(
    code: str, language: str, before: str, after: str, closed: bool
) -> None:
    text = f"{before}```{language}\n{code}" + (f"```{after}" if closed else "")
    assert strip_fence(text).removeprefix("\n") == code.removeprefix("\n")


def test_only_the_first_fence_counts() -> None:
    assert strip_fence("```\none\n```\nor\n```\ntwo\n```").strip() == "one"


@settings(deadline=None)
@given(st.text(st.characters(codec="ascii", exclude_characters="`\r\n"), min_size=1))
def test_a_fence_in_one_line_names_no_language(code: str) -> None:
    assert strip_fence(f"Try ```{code}``` now") == code
