"""The coding skill: write a Python function; unit tests run it in the sandbox.

A problem composes a filter, a map and a reduction over a list of integers ("the sum of the squares
of the even numbers"), so that problems of the test split are new combinations of known parts.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from cycleqd_jax.sandbox.base import Job, Outcome
from cycleqd_jax.tasks.base import Ask, Episode, Message, Problem, Run, Split, draw_problems

NAMES = [
    "solve",
    "total",
    "work",
    "pick",
    "run",
    "make",
    "find",
    "check",
    "get",
    "scan",
    "fold",
    "calc",
    "test",
    "build",
    "apply",
    "step",
]


@dataclass(frozen=True)
class Part:
    """One building block: its words, its Python text and what it computes."""

    words: str
    code: str
    function: Callable[..., Any]
    takes_number: bool = False


FILTERS = (
    Part("numbers", "", lambda x, k: True),
    Part("even numbers", "x % 2 == 0", lambda x, k: x % 2 == 0),
    Part("odd numbers", "x % 2 == 1", lambda x, k: x % 2 == 1),
    Part("positive numbers", "x > 0", lambda x, k: x > 0),
    Part("negative numbers", "x < 0", lambda x, k: x < 0),
    Part("numbers above {}", "x > {}", lambda x, k: x > k, True),
    Part("numbers below {}", "x < {}", lambda x, k: x < k, True),
    Part("multiples of {}", "x % {} == 0", lambda x, k: x % k == 0, True),
    Part("numbers other than {}", "x != {}", lambda x, k: x != k, True),
)
MAPS = (
    Part("", "x", lambda x, k: x),
    Part("squares of", "x * x", lambda x, k: x * x),
    Part("doubles of", "2 * x", lambda x, k: 2 * x),
    Part("negatives of", "-x", lambda x, k: -x),
    Part("sizes of", "abs(x)", lambda x, k: abs(x)),
    Part("values plus {} of", "x + {}", lambda x, k: x + k, True),
    Part("values minus {} of", "x - {}", lambda x, k: x - k, True),
    Part("values times {} of", "x * {}", lambda x, k: x * k, True),
)
REDUCTIONS = (
    Part("sum", "sum({})", sum),
    Part("count", "len([{}])", len),
    Part("largest", "max([{}], default=0)", lambda xs: max(xs, default=0)),
    Part("smallest", "min([{}], default=0)", lambda xs: min(xs, default=0)),
    Part("list", "[{}]", list),
    Part("sorted list", "sorted({})", sorted),
    Part("set", "set({})", lambda xs: {"set": sorted(set(xs))}),
)
TEMPLATES = (
    "Write a Python function {name} that returns the {what}.",
    "Define {name}(xs) to return the {what}.",
    "I need a function called {name}. It should return the {what}.",
)

# Runs in the sandbox. The solution arrives on standard input and never learns the expected values;
# whatever it prints goes to standard error, so it cannot disturb the answer.
_JUDGE = """
import json, sys
task = json.load(sys.stdin)
answer, sys.stdout = sys.stdout, sys.stderr
space = {"__name__": "solution"}
exec(compile(task["source"], "solution.py", "exec"), space)
results = []
for arguments in task["calls"]:
    value = space[task["function"]](*arguments)
    results.append({"set": sorted(value)} if isinstance(value, (set, frozenset)) else value)
json.dump(results, answer)
answer.flush()
"""


@dataclass(frozen=True, kw_only=True)
class CodingProblem(Problem):
    """A function to write, with the calls that test it and their results.

    Attributes:
        function: its name.
        calls: the arguments of every call.
        expected: the results, in JSON's types; a set is ``{"set": its sorted members}``.
    """

    function: str
    calls: tuple[tuple[list[int]], ...]
    expected: tuple[Any, ...]


@dataclass(frozen=True)
class CodingTask:
    """Python functions over lists of integers, judged by unit tests."""

    name: Literal["coding"] = "coding"

    def problems(
        self, split: Split, count: int, *, seed: int = 0, difficulty: int = 1
    ) -> list[CodingProblem]:
        """Draw ``count`` distinct problems of one split."""
        return draw_problems(make_problem, split, count, seed, difficulty)

    def episode(self, problem: Problem) -> Episode:
        """Ask for the function once, run the unit tests, score 1.0 if all pass."""
        assert isinstance(problem, CodingProblem)
        text = yield Ask((Message("user", problem.prompt),))
        payload = {
            "source": strip_fence(str(text)),
            "function": problem.function,
            "calls": problem.calls,
        }
        outcome = yield Run(Job(kind="python", source=_JUDGE, stdin=json.dumps(payload)))
        assert isinstance(outcome, Outcome)
        return float(outcome.status == "ok" and _same(outcome.stdout, problem.expected))


def make_problem(rng: random.Random, difficulty: int) -> CodingProblem:
    """Draw one problem: a filter, a map and a reduction; each further difficulty adds a filter."""
    name = rng.choice(NAMES)
    filters = [_draw(rng, FILTERS)]
    if difficulty > 1:
        filters += [_draw(rng, FILTERS[1:]) for _ in range(difficulty - 1)]
    mapping = _draw(rng, MAPS)
    reduction = rng.choice(REDUCTIONS)
    nouns = " that are also ".join(part.words.format(k) for part, k in filters)
    what = " ".join(
        word
        for word in (
            reduction.words,
            "of the",
            mapping[0].words.format(mapping[1]),
            "the" if mapping[0].words else "",
            nouns,
            "in xs",
        )
        if word
    )
    conditions = " and ".join(part.code.format(k) for part, k in filters if part.code)
    body = f"{mapping[0].code.format(mapping[1])} for x in xs"
    body += f" if {conditions}" if conditions else ""
    expression = reduction.code.format(body)
    code = f"def {name}(xs):\n    return {expression}"
    prompt = rng.choice(TEMPLATES).format(name=name, what=what)
    cases = random.Random(prompt)
    inputs = [[], *([cases.randint(-20, 20) for _ in range(cases.randint(4, 9))] for _ in range(5))]

    def answer(xs: list[int]) -> Any:
        kept = [x for x in xs if all(part.function(x, k) for part, k in filters)]
        return reduction.function([mapping[0].function(x, mapping[1]) for x in kept])

    return CodingProblem(
        prompt=prompt,
        answers=(code,),
        solution=expression,
        document=f"# {what}\n{expression}",
        kind=reduction.words,
        function=name,
        calls=tuple((xs,) for xs in inputs),
        expected=tuple(answer(xs) for xs in inputs),
    )


def strip_fence(text: str) -> str:
    """Return the inside of the first Markdown code fence, or the text itself when there is none."""
    if "```" not in text:
        return text
    inside = text.split("```", 2)[1]
    first, newline, rest = inside.partition("\n")
    return rest if newline and first.strip().isalnum() else inside


def _draw(rng: random.Random, parts: tuple[Part, ...]) -> tuple[Part, int]:
    return rng.choice(parts), rng.randint(2, 9)


def _same(stdout: str, expected: tuple[Any, ...]) -> bool:
    """Whether the results are the expected ones, in value and in type: True is not 1."""
    try:
        # Python calls True, 1 and 1.0 equal; their JSON texts differ.
        return json.dumps(json.loads(stdout)) == json.dumps(expected)
    except (ValueError, RecursionError):
        # The program may have written what it liked: no JSON, a number of 5000 digits, a deep nest.
        return False
