"""What the reference solutions answer: run once in the sandbox, then kept on disk.

An entry is the text that the runs wrote, under a name made of all that was run: another file,
another version of the runner and it is run again. It is JSON, and read as data.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from cycleqd_jax.atomic import write_text_atomic
from cycleqd_jax.sandbox import Job, Outcome, Sandbox, open_sandbox
from cycleqd_jax.tasks.programs.judging import LIMITS, Suite, call_job, read_calls, record_job
from cycleqd_jax.tasks.programs.records import Inputs, Record, Statements

# MBPP+ has references of 15 s on a quick core that is theirs alone.
REFERENCE_LIMITS = replace(LIMITS, seconds=300.0)


def find_suites(
    records: Sequence[Record], cache: Path | None, sandbox: Sandbox | None = None
) -> list[tuple[Suite, ...]]:
    """The suites of each record: of its original tests, then of EvalPlus's where there are some.

    Args:
        records: the problems.
        cache: folder where answers are kept, under ``references/``; None keeps none.
        sandbox: where missing ones are run; None opens one with `REFERENCE_LIMITS`, if need be.

    Raises:
        ValueError: reference solutions fail; all of them are named.
        SandboxUnavailable: there is something to run and no way to.
    """
    jobs = [job for record in records for job in _jobs(record)]
    outcomes = iter(_run(jobs, cache, sandbox) if jobs else [])
    suites, wrong = [], []
    for record in records:
        try:
            suites.append(tuple(_suites(record, outcomes)))
        except ValueError as error:
            wrong.append(f"{record.id}: {error}")
    if wrong:
        raise ValueError(
            f"{len(wrong)} reference solutions fail in the sandbox: correct the files, or leave "
            "these records out:\n" + "\n".join(wrong)
        )
    return suites


def _jobs(record: Record) -> Iterator[Job]:
    if isinstance(record.tests, Inputs):
        for calls in (record.tests.base, record.tests.plus):
            seconds = float(REFERENCE_LIMITS.seconds)
            yield call_job(record, record.reference, calls, [seconds] * len(calls), seconds)
    elif record.tests.calls is None:
        yield record_job(record)


def _suites(record: Record, outcomes: Iterator[Outcome]) -> Iterator[Suite]:
    if isinstance(record.tests, Statements):
        yield Suite(record.tests.calls or _recorded(next(outcomes)))
        return
    # Both are taken from the stream before either may fail.
    for calls, outcome in [
        (calls, next(outcomes)) for calls in (record.tests.base, record.tests.plus)
    ]:
        results, reason = read_calls(outcome, len(calls))
        if reason:
            raise ValueError(reason)
        yield Suite(
            calls,
            tuple(result["value"] for result in results),
            tuple(result["seconds"] for result in results),
        )


def _recorded(outcome: Outcome) -> tuple[object, ...]:
    if outcome.status != "ok":
        raise ValueError(outcome.reason or outcome.stderr[-300:].strip())
    return tuple(json.loads(outcome.stdout))


def _run(jobs: Sequence[Job], cache: Path | None, sandbox: Sandbox | None) -> list[Outcome]:
    entry = cache and cache / "references" / f"{_fingerprint(jobs)}.json"
    texts = _kept(entry) if entry else None
    if texts is not None:
        return [Outcome("ok", 0, text, "") for text in texts]
    with ExitStack() as stack:
        if sandbox is None:
            sandbox = stack.enter_context(open_sandbox(limits=REFERENCE_LIMITS))
        outcomes = sandbox.run(jobs)
    # What failed may have met a busy machine: it is not kept.
    if entry and all(outcome.status == "ok" for outcome in outcomes):
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(entry, json.dumps([outcome.stdout for outcome in outcomes]))
    return outcomes


def _kept(entry: Path) -> list[str] | None:
    """The texts of an entry; None where there is none, or one that is no JSON any more."""
    try:
        texts: list[str] = json.loads(entry.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return texts


def _fingerprint(jobs: Sequence[Job]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for job in jobs:
        digest.update(hashlib.blake2b(job.source.encode()).digest())
        digest.update(hashlib.blake2b(job.stdin.encode()).digest())
    return digest.hexdigest()
