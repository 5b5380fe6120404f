"""The public files of AgentBench v0.2's OS interaction, read and checked problem by problem."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from cycleqd_jax.tasks.benchmark import Irregular, field_of, make_records

CATEGORIES = ("1", "2", "3", "4", "5", "6", "7")
LANGUAGES = ("bash", "python")
_SCRIPTS = Path(__file__).parent / "scripts"

# What CycleQD leaves out of the 170 problems: its `tasks/agentbench_os.py` lists the indices of
# the other 110, in the order of its `os_interaction/configs/std.yaml` with dev.json at the end.
_NOT_IN_PAPER = frozenset(
    (0, 6, 9, 10, 14, 18, 20, 29, 30, 31, 32, 33, 37, 38, 41, 47, 48, 53, 55, 56, 58, 59, 62, 64,
     65, 67, 68, 69, 70, 71, 72, 73, 74, 80, 81, 82, 85, 86, 87, 91, 95, 98, 100, 104, 106, 107,
     110, 112, 113, 114, 120, 121, 122, 125, 126, 127, 130, 131, 134, 143)
)  # fmt: skip


@dataclass(frozen=True)
class Script:
    """A program and the language it is in, one of `LANGUAGES`."""

    language: str
    code: str

    def command(self, *arguments: str) -> list[str]:
        """How v0.2 calls it: a script in bash finds "--" in front of its arguments."""
        if self.language == "bash":
            return ["bash", "-c", self.code, *(("--", *arguments) if arguments else ())]
        return ["python3", "-c", self.code, *arguments]


@dataclass(frozen=True)
class Record:
    """One problem.

    Attributes:
        id: category, file and place in it, ``4/Q30/2`` or ``dev/3``; stable, as the public files do
            not change.
        index: its place in all files read one after the other.
        kind: the category, "1" to "7" or "dev".
        description: what is asked.
        init: scripts that run beside the agent's shell before it is asked.
        start: a script typed in that shell.
        match: the right answer; None where `checks` decide.
        checks: run in turn, each with the answer and the outputs of those before it; None stands
            for `example`.
        example: the reference solution, if there is one.
    """

    id: str
    index: int
    kind: str
    description: str
    init: tuple[Script, ...] = ()
    start: Script | None = None
    match: str | None = None
    checks: tuple[Script | None, ...] = ()
    example: Script | None = None

    @property
    def group(self) -> str:
        """What problems share that must not be told apart: the solution, else the question."""
        return self.example.code.strip() if self.example else self.description


def read_records(folder: Path, *, irregular: Irregular = "error") -> list[Record]:
    """Read the problems of an OS interaction folder: the categories 1 to 7, then dev.

    Args:
        folder: holds ``data/1/*.json`` to ``data/7/*.json`` and ``data/dev.json``; a file is a list
            of problems or one problem.
        irregular: a problem that is not as it should be is an "error", or is left out ("skip"). The
            indices of the others stay what they are. The public files have none.

    Raises:
        ValueError: files are missing or not JSON, or problems are irregular: all of them are named,
            by file and place.
    """
    return make_records(_makers(folder), "OS problems", folder, irregular, "osbench/offline")


def _makers(folder: Path) -> Iterator[tuple[str, Callable[[], Record]]]:
    index = 0
    for path, kind in _files(folder):
        prefix = kind if kind == "dev" else f"{kind}/{path.stem}"
        for place, raw in enumerate(_problems(path)):
            make = partial(_record, raw, f"{prefix}/{place}", index, kind)
            yield f"{path}: problem {place}", make
            index += 1


def in_paper(record: Record) -> bool:
    """Whether CycleQD evaluates on this problem: 110 of the 170."""
    return record.index not in _NOT_IN_PAPER


def _files(folder: Path) -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    for kind in CATEGORIES:
        files = sorted((folder / "data" / kind).glob("*.json"))
        if not files:
            raise ValueError(
                f"{folder / 'data' / kind}: no problems; expected a folder with AgentBench v0.2's "
                "data/os_interaction"
            )
        found += [(path, kind) for path in files]
    return [*found, (folder / "data" / "dev.json", "dev")]


def _problems(path: Path) -> Iterator[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; expected a folder with AgentBench v0.2's data/os_interaction"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON in UTF-8, found {error}") from None
    return iter(content if isinstance(content, list) else [content])


def _record(raw: Any, record_id: str, index: int, kind: str) -> Record:
    description = field_of(raw, "description", str)
    evaluation = field_of(raw, "evaluation", dict)
    create = raw.get("create")
    if not isinstance(create, dict | list | None):
        raise ValueError(f"create: expected an object, found {create!r}")
    # Two public problems have a stray list here, in which v0.2 finds nothing to set up.
    init = create.get("init") if isinstance(create, dict) else None
    example = _optional(evaluation, "example") or _optional(raw, "example")
    match: str | None = None
    checks: tuple[Script | None, ...] = ()
    if "match" in evaluation:
        match = field_of(evaluation, "match", str)
    elif "check" in evaluation:
        checks = _scripts(evaluation["check"], "check")
    if match is None and not checks:
        raise ValueError("evaluation: expected match or check, found neither")
    if None in checks and example is None:
        raise ValueError("check: null stands for the example, and there is no example")
    return Record(
        id=record_id,
        index=index,
        kind=kind,
        description=description,
        init=tuple(s for s in _scripts(init, "init") if s) if init is not None else (),
        start=_optional(raw, "start"),
        match=match,
        checks=checks,
        example=example,
    )


def _scripts(raw: Any, name: str) -> tuple[Script | None, ...]:
    return tuple(
        None if one is None else _script(one, name)
        for one in (raw if isinstance(raw, list) else [raw])
    )


def _optional(raw: dict[str, Any], name: str) -> Script | None:
    return _script(raw[name], name) if raw.get(name) is not None else None


def _script(raw: Any, name: str) -> Script:
    if isinstance(raw, str):
        return Script("bash", raw)
    if not isinstance(raw, dict):
        raise ValueError(f"{name}: expected a script, found {raw!r}")
    language = raw.get("language", "bash")
    if language not in LANGUAGES:
        raise ValueError(f"{name}: expected one of {', '.join(LANGUAGES)}, found {language!r}")
    if "file" in raw:
        return Script(language, _shipped(field_of(raw, "file", str), name))
    return Script(language, field_of(raw, "code", str))


def _shipped(file: str, name: str) -> str:
    scripts = _shipped_scripts()
    if file not in scripts:
        raise ValueError(
            f"{name}: expected one of the scripts {', '.join(scripts)}, found {file!r}"
        )
    return scripts[file]


@lru_cache
def _shipped_scripts() -> dict[str, str]:
    """The helper scripts that problems name, written anew from what they do."""
    paths = sorted(path for path in _SCRIPTS.rglob("*") if path.suffix in (".py", ".sh"))
    return {str(p.relative_to(_SCRIPTS)): p.read_text(encoding="utf-8") for p in paths}
