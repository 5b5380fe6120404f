"""MBPP, MBPP+, HumanEval and HumanEval+: write a function; tests decide."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cycleqd_jax.cache import default_cache
from cycleqd_jax.sandbox.base import Limits, Sandbox
from cycleqd_jax.tasks.base import Ask, Episode, Message, Problem, Split
from cycleqd_jax.tasks.benchmark import BenchmarkTask, Irregular, choose_problems, data_folder
from cycleqd_jax.tasks.programs import prompt
from cycleqd_jax.tasks.programs.judging import LIMITS, Suite, Verdict, judge, judge_all
from cycleqd_jax.tasks.programs.records import FILES, Name, OfficialSplit, Record, read_records
from cycleqd_jax.tasks.programs.references import find_suites


@dataclass(frozen=True, kw_only=True)
class ProgramProblem(Problem):
    """A function to write.

    Attributes:
        record: what is asked, and the tests.
        suites: the calls that judge it, with the reference's results.
        opening: the conversation before the model's turn.
    """

    record: Record
    suites: tuple[Suite, ...]
    opening: tuple[Message, ...]

    @property
    def demonstration(self) -> tuple[Message, ...]:
        """The whole ideal conversation, with the system's message before it if there is one."""
        return (*self.opening, *super().demonstration[1:])


@dataclass(frozen=True)
class ProgramTask(BenchmarkTask[ProgramProblem]):
    """One public benchmark of programs.

    Attributes:
        records: the problems, `read_records`.
        suites: of each, `find_suites`.
        name: the name scores are reported under.
        style: of the prompt.
        base_only: score the original tests and leave EvalPlus's out.
        limits: what a program may use; open the sandbox with no less.
    """

    records: tuple[Record, ...]
    suites: tuple[tuple[Suite, ...], ...]
    name: str
    style: prompt.Style = "published"
    base_only: bool = False
    limits: Limits = LIMITS

    def make_problems(self) -> Iterator[ProgramProblem]:
        """Make every record with its suites a problem."""
        for record, suites in zip(self.records, self.suites, strict=True):
            yield make_problem(record, suites, self.name, self.style)

    def problems(
        self, split: Split, count: int, *, seed: int = 0, difficulty: int = 1
    ) -> list[ProgramProblem]:
        """Choose ``count`` problems of one split; they have no difficulties to choose from.

        A problem's id decides its split, in all editions of a benchmark alike: what a search saw in
        MBPP+ is no test in MBPP. Besides, a problem of the authors' own test split feeds neither
        search nor validation, so `official` ("test") stays comparable with published scores.

        Raises:
            ValueError: the split has fewer problems, or there is no such split.
        """
        allowed = [
            problem
            for problem in self._problems
            if split == "test" or problem.record.split != "test"
        ]
        return choose_problems(self.name, allowed, split, count, seed)

    def official(self, split: OfficialSplit) -> list[ProgramProblem]:
        """All problems of a split that the benchmark's authors made, in the order of the file.

        Raises:
            ValueError: they made no such split; MBPP's alone have any.
        """
        found = [p for p in self._problems if p.record.split == split]
        if not found:
            known = sorted({p.record.split or "none" for p in self._problems})
            raise ValueError(
                f"task {self.name}: expected one of its authors' splits ({', '.join(known)}), "
                f"found {split!r}"
            )
        return found

    def episode(self, problem: Problem) -> Episode:
        """Ask once, run the tests; score 1.0 or 0.0: pass@1, plus where there are such tests."""
        assert isinstance(problem, ProgramProblem)
        text = str((yield Ask(problem.opening)))
        verdict: Verdict = yield from judge(
            problem.record, problem.suites, text, base_only=self.base_only
        )
        return float(verdict.base if verdict.plus is None else verdict.plus)

    def verdicts(
        self, problems: Sequence[ProgramProblem], answers: Sequence[str], sandbox: Sandbox
    ) -> list[Verdict]:
        """Judge answers that are there already, base and plus; one answer a problem."""
        return judge_all([(p.record, p.suites) for p in problems], answers, sandbox)


@dataclass(frozen=True)
class PassRates:
    """pass@1 of some answers.

    Attributes:
        base: share that passes the original tests.
        plus: share that passes EvalPlus's as well, None where there are none.
    """

    base: float
    plus: float | None


def pass_rates(verdicts: Sequence[Verdict]) -> PassRates:
    """pass@1, base and plus, as EvalPlus reports them.

    Raises:
        ValueError: there are no verdicts.
    """
    if not verdicts:
        raise ValueError("pass_rates: expected verdicts, found none")
    plus = [verdict.plus for verdict in verdicts if verdict.plus is not None]
    return PassRates(
        sum(verdict.base for verdict in verdicts) / len(verdicts),
        sum(plus) / len(verdicts) if plus else None,
    )


def make_problem(
    record: Record, suites: tuple[Suite, ...], name: str, style: prompt.Style = "published"
) -> ProgramProblem:
    """A record as a problem; its answer is the reference solution."""
    opening = prompt.opening(record, style)
    return ProgramProblem(
        prompt=opening[-1].content,
        answers=(prompt.write_answer(record),),
        solution=record.id,
        document=f"{record.text}\n{record.reference}",
        kind=name,
        record=record,
        suites=suites,
        opening=opening,
    )


def open_programs(
    name: Name,
    folder: Path,
    *,
    preset: Literal["published", "paper"] = "published",
    irregular: Irregular = "error",
    cache: Path | None = None,
    sandbox: Sandbox | None = None,
) -> ProgramTask:
    """A benchmark from a folder of the user's.

    Args:
        name: which.
        folder: holds `records.FILES`.
        preset: "paper" asks and scores as CycleQD's code does: its prompt, MBPP+'s base tests.
        irregular: see `read_records`.
        cache: where the reference solutions' results are kept; None runs them again.
        sandbox: where they are run; None opens one for it.

    Raises:
        ValueError: missing or irregular files, or reference solutions that fail.
        SandboxUnavailable: there is something to run and no way to.
    """
    records = tuple(read_records(name, folder, irregular=irregular))
    paper = preset == "paper"
    return ProgramTask(
        records=records,
        suites=tuple(find_suites(records, cache, sandbox)),
        name=f"{name}/paper" if paper else name,
        style=preset,
        base_only=paper,
    )


def programs_from_environment(
    name: Name, preset: Literal["published", "paper"] = "published"
) -> ProgramTask:
    """A benchmark from ``$CYCLEQD_DATA``; results are kept in ``$CYCLEQD_CACHE``.

    Raises:
        ValueError: see `open_programs`, or ``$CYCLEQD_DATA`` is not set.
    """
    family, _, file = FILES[name].partition("/")
    folder = data_folder(name, family, file)
    return open_programs(name, folder.parent, preset=preset, cache=default_cache())
