"""Calls a function of a program, or replays tests on what it returned. Runs in the sandbox.

The whole file is a job's source; the task arrives as JSON on standard input. The judge imports
`encode` and `decode` from it, so that both sides of the wall mean the same by a value.

Three modes. "call": run a program nobody trusts, call its function, write every result; neither
the tests nor what they expect are in this process. "record": run the tests on the reference
solution and write the calls that they make. "replay": run the tests once more, the function
answered by results of an earlier "call"; no line of the judged program is in this process, and a
result is plain data whose equality nobody wrote.

Values travel as JSON. None, truth values, text, lists, floats and ordinary integers are themselves;
everything else is an object with one key, the kind.
"""

import json
import marshal
import os
import resource
import signal
import sys
import time
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from types import ModuleType
from typing import Any

# A result with more bytes than this is compared by its digest.
LARGE = 1 << 14
_PLAIN_INT = 1 << 63
_LAZY = (Iterator, KeysView, ValuesView, ItemsView, range)


class Overtime(BaseException):
    """A call took too long; no `except Exception` of the program's stops it."""


class Opaque:
    """A value of a type that is not carried over: its name, and whether it counts as true."""

    def __init__(self, kind: str, truth: bool) -> None:
        self.kind = kind
        self.truth = truth

    def __bool__(self) -> bool:
        return self.truth


class Digest:
    """A value too large to carry over: equal to one that Python writes down in the same bytes."""

    def __init__(self, kind: str, digest: str) -> None:
        self.kind = kind
        self.digest = digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digest) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def encode(value: Any) -> Any:
    """The value in JSON's types; of a subclass what its built-in base holds.

    Raises RecursionError for a value that is too deep or holds itself.
    """
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is list:
        return [encode(item) for item in value]
    if isinstance(value, int):
        number = int(value)
        return number if -_PLAIN_INT < number < _PLAIN_INT else {"int": hex(number)}
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in tuple.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in dict.items(value)]}
    if isinstance(value, frozenset):
        return {"frozenset": [encode(item) for item in frozenset.__iter__(value)]}
    if isinstance(value, set):
        return {"set": [encode(item) for item in set.__iter__(value)]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, list):
        return [encode(item) for item in list.__iter__(value)]
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, _LAZY):
        return {"iterator": [encode(item) for item in value]}
    return {"opaque": [kind.__name__, bool(value)]}


def decode(value: Any) -> Any:
    """The value that `encode` was given, made of built-in types, `Opaque` and `Digest` only.

    Raises ValueError, TypeError, KeyError, RecursionError or OverflowError for what `encode` never
    writes.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    return _DECODERS[kind](content)


_DECODERS = {
    "int": lambda text: int(text, 16),
    "tuple": lambda items: tuple(map(decode, items)),
    "dict": lambda pairs: {decode(key): decode(item) for key, item in pairs},
    "frozenset": lambda items: frozenset(map(decode, items)),
    "set": lambda items: set(map(decode, items)),
    "complex": lambda parts: complex(float(parts[0]), float(parts[1])),
    "bytes": bytes.fromhex,
    "iterator": lambda items: iter(list(map(decode, items))),
    "opaque": lambda parts: Opaque(str(parts[0]), bool(parts[1])),
    "digest": lambda parts: Digest(str(parts[0]), str(parts[1])),
}


def write_down(value: Any) -> Any:
    """`encode`, or the digest of a value that is `LARGE`."""
    try:
        # Version 0 knows no references and no interned text: equal values, equal bytes.
        packed = marshal.dumps(value, 0)
    except ValueError:
        packed = b""
    if len(packed) <= LARGE:
        written = encode(value)
        text = json.dumps(written)
        if len(text) <= 4 * LARGE:
            return written
        packed = text.encode()
    from hashlib import blake2b

    return {"digest": [type(value).__name__, blake2b(packed, digest_size=16).hexdigest()]}


def load(name: str, *sources: str) -> dict[str, Any]:
    """The names of a new module after running the sources in it."""
    module = ModuleType(name)
    sys.modules[name] = module
    for source in sources:
        exec(compile(source, f"{name}.py", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


class Clock:
    """Time limits of calls: processor time, and ten times as much on the wall."""

    def __init__(self, total: float) -> None:
        def ring(*_: object) -> None:
            raise Overtime

        self.ring = ring
        self.set = signal.setitimer
        signal.signal(signal.SIGPROF, ring)
        signal.signal(signal.SIGALRM, ring)
        # What no signal handler ends, a long regular expression for instance, the kernel does.
        most, seconds = resource.getrlimit(resource.RLIMIT_CPU)[1], int(total) + 1
        if most == resource.RLIM_INFINITY or seconds < most:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))

    def start(self, seconds: float) -> None:
        """Ring after so many seconds, and again, should that be ignored."""
        self.set(signal.ITIMER_PROF, seconds, 0.1)
        self.set(signal.ITIMER_REAL, 10 * seconds, 0.1)

    def stop(self) -> None:
        """Ring no more."""
        self.set(signal.ITIMER_PROF, 0)
        self.set(signal.ITIMER_REAL, 0)


def call(task: dict[str, Any], answer: Any) -> None:
    """Results of all calls, a line each, up to the first that fails."""
    clock = Clock(task["total"])
    now, write = time.process_time, write_down
    limits = task["limits"]
    try:
        clock.start(max(limits, default=1.0))
        space = load("solution", task["program"], task["setup"])
        function = space[task["function"]]
        clock.stop()
        for number, request in enumerate(task["calls"]):
            # An expression of the tests, or the arguments.
            code = compile(request, "call", "eval") if isinstance(request, str) else None
            arguments = () if code else decode(request)
            clock.start(limits[number])
            started = now()
            value = eval(code, space) if code else function(*arguments)
            # Writing is part of it: a result may be lazy, or very large.
            written = write(value)
            seconds = now() - started
            clock.stop()
            answer.write(json.dumps({"value": written, "seconds": round(seconds, 4)}) + "\n")
            answer.flush()
    except BaseException as error:
        clock.stop()
        answer.write(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}) + "\n")


class Recorder:
    """Stands for the function: lets the reference solution answer and keeps the calls."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.calls: list[Any] = []
        self._inside = False

    def __call__(self, *arguments: Any) -> Any:
        """The reference's answer; calls that it makes itself are not kept."""
        if self._inside:
            return self.function(*arguments)
        self.calls.append(encode(arguments))
        self._inside = True
        try:
            return self.function(*arguments)
        finally:
            self._inside = False


class Replayer:
    """Stands for the function: answers with earlier results, in the order of the calls."""

    def __init__(self, calls: list[Any], results: list[Any]) -> None:
        self._calls = calls
        self._results = results
        self._at = 0

    def __call__(self, *arguments: Any) -> Any:
        """The next result; an AssertionError when the tests call in another way than they did."""
        call = self._calls[self._at]
        assert isinstance(call, str) or call == encode(arguments), "another call than recorded"
        self._at += 1
        return decode(self._results[self._at - 1])

    def finish(self) -> None:
        """An AssertionError when the tests made fewer calls than they did."""
        assert self._at == len(self._calls), "fewer calls than recorded"


def test(task: dict[str, Any], stand_in: Any, space: dict[str, Any]) -> None:
    """Run the tests with a stand-in for the function."""
    space[task["function"]] = stand_in
    exec(compile(task["tests"], "tests.py", "exec"), space)


def main() -> None:
    """One task."""
    task = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    # What programs print is nobody's business and nobody's burden.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if task["mode"] == "call":
        sys.stderr = sys.stdout
        call(task, answer)
    else:
        space = load("reference", task["program"], task["setup"])
        if task["mode"] == "record":
            recorder = Recorder(space[task["function"]])
            test(task, recorder, space)
            json.dump(recorder.calls, answer)
        else:
            replayer = Replayer(task["calls"], task["results"])
            test(task, replayer, space)
            replayer.finish()
            answer.write("passed")
    answer.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
