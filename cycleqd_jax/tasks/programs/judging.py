"""From a program to a verdict: calls in the sandbox, comparison outside of it.

The judged program and what it should return are never in one process. It gets calls and gives
results as data; those are compared here (`oracles`), or, for benchmarks whose tests are statements,
in another sandboxed process that runs the tests on the results and no line of the program. So a
program can neither read the answers nor change how they are compared: whatever it does, it has only
claimed some results.
"""

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cycleqd_jax.sandbox.base import Job, Limits, Outcome, Sandbox
from cycleqd_jax.tasks.base import Run
from cycleqd_jax.tasks.programs.answers import defines, find_program
from cycleqd_jax.tasks.programs.oracles import first_wrong
from cycleqd_jax.tasks.programs.records import Inputs, Record, Statements
from cycleqd_jax.tasks.programs.runner import LARGE, decode

# EvalPlus allows a program 60 s and 4 GB. A call that is too slow ends itself much earlier.
LIMITS = Limits(seconds=60.0, memory_mb=4096, output_kb=4096)
_CALL_SECONDS, _SLOWER = 1.0, 4.0  # EvalPlus: at least this long, or this many times the reference
# HumanEval stops after 3 s; but MBPP has references that take 2 s, and machines are busy.
_TEST_SECONDS = 10.0
_MORE_SECONDS = 10.0  # for all calls, beside their multiple of the reference's time

# The longest line the runner writes: a result that is not yet a digest.
_MAX_LINE = 4 * LARGE + 100
_MALFORMED = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Suite:
    """Calls and what the reference solution did with them.

    Attributes:
        calls: `runner.encode`-d arguments, or expressions.
        expected: the reference's results, `runner.encode`-d; None where statements decide.
        seconds: processor time that each call took the reference, None where it was not measured.
    """

    calls: tuple[Any, ...]
    expected: tuple[Any, ...] | None = None
    seconds: tuple[float, ...] | None = None

    @property
    def limits(self) -> list[float]:
        """Seconds that each call of a judged program may take."""
        if self.seconds is None:
            return [_TEST_SECONDS] * len(self.calls)
        return [max(_CALL_SECONDS, _SLOWER * seconds) for seconds in self.seconds]


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        base: whether it passes the original tests.
        plus: whether it passes those and EvalPlus's; None where there are none, or if they were not
            asked for.
        reason: why not, for whoever reads it.
    """

    base: bool
    plus: bool | None = None
    reason: str = ""


Steps = Generator[Run, Outcome, Verdict]


def judge(
    record: Record, suites: Sequence[Suite], answer: str, *, base_only: bool = False
) -> Steps:
    """Judge what a model said; a part of an episode.

    Args:
        record: the problem.
        suites: of the original tests, and of EvalPlus's where the record has some.
        answer: the model's text.
        base_only: leave EvalPlus's tests out. They are run only on programs that pass the others.
    """
    program = program_of(record, answer)
    reason = yield from _run(record, suites[0], program)
    if reason:
        return Verdict(False, None if base_only or len(suites) < 2 else False, reason)
    if base_only or len(suites) < 2:
        return Verdict(True)
    reason = yield from _run(record, suites[1], program)
    return Verdict(True, not reason, reason)


def judge_all(
    problems: Iterable[tuple[Record, Sequence[Suite]]],
    answers: Iterable[str],
    sandbox: Sandbox,
    *,
    base_only: bool = False,
) -> list[Verdict]:
    """Judge many answers side by side, such as those of a transcript; one problem an answer."""
    live = [
        (index, judge(record, suites, answer, base_only=base_only))
        for index, ((record, suites), answer) in enumerate(zip(problems, answers, strict=True))
    ]
    verdicts: dict[int, Verdict] = {}
    given: list[Any] = [None] * len(live)
    while live:
        waiting = []
        for (index, steps), outcome in zip(live, given, strict=True):
            try:
                waiting.append((index, steps, steps.send(outcome).job))
            except StopIteration as end:
                verdicts[index] = end.value
        live = [(index, steps) for index, steps, _ in waiting]
        given = list(sandbox.run([job for _, _, job in waiting]))
    return [verdicts[index] for index in sorted(verdicts)]


def program_of(record: Record, answer: str) -> str:
    """The whole program that an answer stands for."""
    program = find_program(answer, record.function, record.stub)
    if isinstance(record.tests, Statements) and record.stub and defines(program, record.function):
        # HumanEval's own harness runs every answer after the prompt, with its imports and helpers.
        return f"{record.stub}\n    pass\n\n{program}"
    return program


def call_job(
    record: Record, program: str, calls: Sequence[Any], limits: Sequence[float], total: float
) -> Job:
    """Run a program and make these calls; `read_calls` understands its outcome."""
    setup = record.tests.setup if isinstance(record.tests, Statements) else ""
    return _job("call", record, program=program, setup=setup, calls=calls, limits=limits,
                total=total)  # fmt: skip


def record_job(record: Record) -> Job:
    """Run the tests on the reference solution; writes the calls that they make."""
    return _job("record", record, program=record.reference, **_statements(record))


def read_calls(outcome: Outcome, count: int) -> tuple[list[dict[str, Any]], str]:
    """What calls gave, and why there are fewer than ``count``.

    Each has a "value", `runner.encode`-d or anything else that is JSON: an untrusted program may
    have written it.
    """
    found: list[dict[str, Any]] = []
    for line in outcome.stdout.split("\n")[:count]:
        try:
            result = json.loads(line) if len(line) <= _MAX_LINE else None
        except (ValueError, RecursionError):
            break
        if not isinstance(result, dict) or "value" not in result:
            reason = result.get("error") if isinstance(result, dict) else None
            return found, f"call {len(found) + 1}: {reason or 'no result'}"
        found.append(result)
    if outcome.status != "ok":
        return found, outcome.reason or outcome.stderr[-300:] or outcome.status
    return found, "" if len(found) == count else "the program ended before it had answered"


def _run(record: Record, suite: Suite, program: str) -> Generator[Run, Outcome, str]:
    """Why the program fails these tests, "" if it passes."""
    if not suite.calls:
        return ""
    total = _MORE_SECONDS + _SLOWER * sum(suite.seconds or ())
    outcome = yield Run(call_job(record, program, suite.calls, suite.limits, total))
    assert isinstance(outcome, Outcome)
    results, reason = read_calls(outcome, len(suite.calls))
    if reason:
        return reason
    values = [result["value"] for result in results]
    if suite.expected is not None:
        return _compare(record, suite, values)
    payload = {"program": record.reference, "calls": suite.calls, "results": values}
    outcome = yield Run(_job("replay", record, **payload, **_statements(record)))
    assert isinstance(outcome, Outcome)
    if outcome.status == "ok" and outcome.stdout == "passed":
        return ""
    return outcome.reason or outcome.stderr[-300:].strip() or "wrong"


def _compare(record: Record, suite: Suite, values: list[Any]) -> str:
    assert isinstance(record.tests, Inputs)
    assert suite.expected is not None
    wrong = first_wrong(
        record.family,
        record.function,
        record.tests.tolerance,
        [decode(call) for call in suite.calls],
        [decode(value) for value in suite.expected],
        _decoded(values),
    )
    return "" if wrong is None else f"call {wrong + 1}: wrong result"


def _decoded(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        try:
            yield decode(value)
        except _MALFORMED:
            return


def _statements(record: Record) -> dict[str, str]:
    assert isinstance(record.tests, Statements)
    return {"tests": record.tests.source, "setup": record.tests.setup}


def _job(mode: str, record: Record, **payload: Any) -> Job:
    task = {"mode": mode, "function": record.function, **payload}
    return Job(kind="python", source=_runner(), stdin=json.dumps(task))


@lru_cache
def _runner() -> str:
    return Path(__file__).with_name("runner.py").read_text(encoding="utf-8")
