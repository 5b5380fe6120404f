"""The public files of MBPP, MBPP+, HumanEval and HumanEval+, read and checked record by record."""

import ast
import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cycleqd_jax.tasks.benchmark import Irregular, field_of, make_records
from cycleqd_jax.tasks.programs.answers import parse
from cycleqd_jax.tasks.programs.oracles import Family
from cycleqd_jax.tasks.programs.restore import restore
from cycleqd_jax.tasks.programs.runner import encode

Name = Literal["mbpp", "mbpp/sanitized", "mbpp+", "humaneval", "humaneval+"]
OfficialSplit = Literal["prompt", "test", "validation", "train"]

# Where the files are below the data folder.
FILES: dict[Name, str] = {
    "mbpp": "mbpp/mbpp.jsonl",
    "mbpp/sanitized": "mbpp/sanitized-mbpp.json",
    "mbpp+": "mbpp/MbppPlus*.jsonl*",
    "humaneval": "humaneval/HumanEval.jsonl*",
    "humaneval+": "humaneval/HumanEvalPlus*.jsonl*",
}
# First and last id of MBPP's splits (Austin et al. 2021, arXiv 2108.07732).
_OFFICIAL: dict[OfficialSplit, tuple[int, int]] = {
    "prompt": (1, 10),
    "test": (11, 510),
    "validation": (511, 600),
    "train": (601, 974),
}


@dataclass(frozen=True)
class Statements:
    """Statements that raise when the function is wrong.

    Attributes:
        source: they name the function as a model is asked to name it.
        setup: statements between the program and its calls: imports, values that are asked about.
        calls: the expressions in `source` that call the function, in the order of evaluation; None
            when only running the tests on the reference solution tells.
    """

    source: str
    setup: str = ""
    calls: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Inputs:
    """Arguments whose right results are those of the reference solution.

    Attributes:
        base: arguments of the original benchmark's tests, one `runner.encode`-d tuple a call.
        plus: those that EvalPlus added.
        tolerance: absolute, for numbers.
    """

    base: tuple[Any, ...]
    plus: tuple[Any, ...]
    tolerance: float


@dataclass(frozen=True)
class Record:
    """One problem.

    Attributes:
        id: ``mbpp/2`` or ``humaneval/0``: the same in every edition of a benchmark.
        family: the benchmark without its edition.
        text: what is asked, as published.
        asserts: tests that MBPP's prompt shows.
        function: the name to define.
        stub: the beginning of a program that a model may continue instead ("" in MBPP).
        reference: the reference solution, a whole program.
        tests: how a program is judged.
        split: the split that the benchmark's authors gave it to, None where they made none.
    """

    id: str
    family: Family
    text: str
    asserts: tuple[str, ...]
    function: str
    stub: str
    reference: str
    tests: Statements | Inputs
    split: OfficialSplit | None = None


def read_records(name: Name, folder: Path, *, irregular: Irregular = "error") -> list[Record]:
    """Read one benchmark from a folder that holds `FILES`.

    Args:
        name: which benchmark.
        folder: the data folder; a ``*`` in `FILES` is a version, and ``.gz`` may be there or not.
        irregular: a record that cannot be judged is an "error", or is left out ("skip").

    Raises:
        ValueError: no such file, more than one version, not UTF-8; or records are irregular: all of
            them are named, by file and line (by place, where the file is one list).
    """
    path = _find(folder, FILES[name])
    seen: set[str] = set()

    def make(read: Callable[[], Any]) -> Record:
        record = _READERS[name](read())
        if record.id in seen:
            raise ValueError(f"task_id: expected different ones, found {record.id} again")
        seen.add(record.id)
        return record

    makers = ((place, partial(make, read)) for place, read in _raw_records(path))
    return make_records(makers, f"{name} records", path, irregular)


def _find(folder: Path, pattern: str) -> Path:
    found = sorted(
        path for path in folder.glob(pattern) if path.name.endswith((".json", ".jsonl", ".gz"))
    )
    if not found:
        raise ValueError(f"{folder / pattern}: no such file; put the benchmark's file there")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder / pattern}: expected one version, found {names}; keep one")
    return found[0]


def _raw_records(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: expected UTF-8 (in gzip, if .gz), found {error}") from None
    if path.suffix == ".json":
        yield from _listed(path, text)
        return
    # Not splitlines: a text may hold a line separator that is none to JSON.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", partial(json.loads, line)


def _listed(path: Path, text: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected one JSON list, found {error}") from None
    if not isinstance(raw, list):
        raise ValueError(f"{path}: expected one JSON list, found {type(raw).__name__}")
    for number, item in enumerate(raw, 1):
        yield f"{path}, record {number}", partial(_same, item)


def _same(item: Any) -> Any:
    return item


def _mbpp(raw: Any) -> Record:
    return _mbpp_record(raw, field_of(raw, "text", str), _text(raw, "test_setup_code"))


def _sanitized(raw: Any) -> Record:
    return _mbpp_record(raw, field_of(raw, "prompt", str), "\n".join(_texts(raw, "test_imports")))


def _mbpp_record(raw: Any, text: str, setup: str) -> Record:
    number = field_of(raw, "task_id", int)
    split = next((s for s, (first, last) in _OFFICIAL.items() if first <= number <= last), None)
    if split is None:
        raise ValueError(f"task_id: expected 1 to {_OFFICIAL['train'][1]}, found {number}")
    tests = _texts(raw, "test_list")
    if not tests:
        raise ValueError("test_list: expected tests, found none")
    reference = _text(raw, "code")
    function = _tested_function(reference, tests)
    return Record(
        id=f"mbpp/{number}",
        family="mbpp",
        text=_unix(text).strip(),
        asserts=tests,
        function=function,
        stub="",
        reference=reference,
        tests=Statements("\n".join(tests), _unix(setup), _calls(function, tests)),
        split=split,
    )


def _mbpp_plus(raw: Any) -> Record:
    number = _number(raw, "Mbpp")
    text = _text(raw, "prompt")
    return Record(
        id=f"mbpp/{number}",
        family="mbpp",
        text=text,
        asserts=(),
        function=field_of(raw, "entry_point", str),
        stub="",
        reference=text + _text(raw, "canonical_solution"),
        tests=_inputs(raw, lambda arguments: restore(number, arguments)),
    )


def _humaneval(raw: Any) -> Record:
    function = field_of(raw, "entry_point", str)
    return _humaneval_record(raw, Statements(f"{_text(raw, 'test')}\ncheck({function})\n"))


def _humaneval_plus(raw: Any) -> Record:
    return _humaneval_record(raw, _inputs(raw, tuple))


def _humaneval_record(raw: Any, tests: Statements | Inputs) -> Record:
    stub = _text(raw, "prompt")
    return Record(
        id=f"humaneval/{_number(raw, 'HumanEval')}",
        family="humaneval",
        text=stub,
        asserts=(),
        function=field_of(raw, "entry_point", str),
        stub=stub,
        reference=stub + _text(raw, "canonical_solution"),
        tests=tests,
    )


_READERS: dict[Name, Callable[[Any], Record]] = {
    "mbpp": _mbpp,
    "mbpp/sanitized": _sanitized,
    "mbpp+": _mbpp_plus,
    "humaneval": _humaneval,
    "humaneval+": _humaneval_plus,
}


def _inputs(raw: Any, restored: Callable[[list[Any]], tuple[Any, ...]]) -> Inputs:
    groups = []
    for name in ("base_input", "plus_input"):
        # One public record (Mbpp/793) has an empty object where others have a list.
        calls = raw.get(name) or [] if isinstance(raw, dict) else None
        if not isinstance(calls, list) or not all(isinstance(call, list) for call in calls):
            raise ValueError(f"{name}: expected a list of argument lists")
        try:
            groups.append(tuple(encode(restored(call)) for call in calls))
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{name}: expected this problem's arguments, found {error}") from error
    if not groups[0]:
        raise ValueError("base_input: expected a list of argument lists, found none")
    tolerance = field_of(raw, "atol", int | float)
    base, plus = groups
    return Inputs(base, plus, float(tolerance))


def _tested_function(reference: str, tests: Sequence[str]) -> str:
    called = {
        node.func.id
        for test in tests
        for node in ast.walk(parse(test))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    defined = [n.name for n in parse(reference).body if isinstance(n, ast.FunctionDef)]
    found = [name for name in dict.fromkeys(defined) if name in called]
    if len(found) != 1:
        raise ValueError(
            f"test_list: expected calls of one function of the code ({', '.join(defined)}), found "
            + (", ".join(found) or "none")
        )
    return found[0]


def _calls(function: str, tests: Sequence[str]) -> tuple[str, ...]:
    calls = []
    for test in tests:
        nodes = [
            node
            for node in ast.walk(parse(test))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == function
        ]
        # The call that ends first is evaluated first: left of the others, or inside them.
        nodes.sort(key=lambda node: (node.end_lineno or 0, node.end_col_offset or 0))
        calls += [ast.get_source_segment(test, node) or "" for node in nodes]
    return tuple(calls)


def _number(raw: Any, family: str) -> int:
    task_id = field_of(raw, "task_id", str)
    found = re.fullmatch(rf"{family}/(\d+)", task_id)
    if found is None:
        raise ValueError(f"task_id: expected {family}/NUMBER, found {task_id!r}")
    return int(found[1])


def _text(raw: Any, name: str) -> str:
    return _unix(field_of(raw, name, str))


def _texts(raw: Any, name: str) -> tuple[str, ...]:
    values = field_of(raw, name, list)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name}: expected texts, found {values!r:.60}")
    return tuple(map(_unix, values))


def _unix(text: str) -> str:
    text.encode()  # a lone surrogate is an error
    return text.replace("\r\n", "\n")
