"""The transcripts of a run: a JSONL file a rollout (format: `cycleqd_jax.tasks.transcript`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from cycleqd_jax.runs.records.jsonl import JsonlWriter, read_jsonl
from cycleqd_jax.tasks.transcript import Transcript


@contextmanager
def record_transcripts(
    folder: Path, phase: str, *, more: bool = False
) -> Iterator[Callable[[Transcript], None]]:
    """Write transcripts to ``folder/PHASE.jsonl`` while the block lasts, each as its episode ends.

    A file of that name is begun anew: it is of the same rollout, which was interrupted. With
    ``more`` it goes on: what is to come is another part of the rollout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = transcript_file(folder, phase)
    if not more:
        path.unlink(missing_ok=True)
    with JsonlWriter(path, plain=True) as log:
        yield lambda transcript: log.write(transcript.to_row())


def transcript_file(folder: Path, phase: str) -> Path:
    """Where the transcripts of a rollout are."""
    return folder / f"{quote(phase.replace('/', '-'), safe='')}.jsonl"


def read_transcripts(path: Path) -> list[Transcript]:
    """The transcripts of a file, by task, problem, candidate and repeat; a missing file has none.

    Raises:
        ValueError: a line is no transcript; the message names file and line.
    """
    found = []
    for number, row in enumerate(read_jsonl(path, plain=True), start=1):
        try:
            found.append(Transcript.from_row(row))
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from error
    return sorted(found, key=lambda one: (one.task, one.problem, one.candidate, one.repeat))
