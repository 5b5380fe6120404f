"""Programs that want to pass without solving anything; none does, and nobody else suffers."""

from collections.abc import Iterator

import pytest

from cycleqd_jax.sandbox import Limits, Sandbox, open_sandbox

from .conftest import Judge

# `{name}` is the function; the honest one returns something else.
CHEATS = {
    "a printed verdict": "print('passed', flush=True)\ndef {name}(x): print('passed')",
    "a verdict on the descriptor": "import os\nos.write(1, b'passed')\ndef {name}(x): pass",
    "results on the descriptor": (
        "import os\nos.write(1, b'{{\"value\": null}}\\n' * 9)\ndef {name}(x): pass"
    ),
    "exit 0": "import sys\ndef {name}(x): sys.exit(0)",
    "exit 0 while loading": "import sys\nsys.exit(0)\ndef {name}(x): pass",
    "exit 0 at once": "import os\ndef {name}(x): os._exit(0)",
    "a verdict and exit 0": (
        "import os\ndef {name}(x):\n    os.write(1, b'passed')\n    os._exit(0)"
    ),
    "equal to everything": (
        "class Yes:\n    def __eq__(self, other): return True\n    __hash__ = object.__hash__\n"
        "    def __sub__(self, other): return 0\n    def __abs__(self): return 0\n"
        "    def __lt__(self, other): return True\n    def __le__(self, other): return True\n"
        "    def __float__(self): return 1.0\n    def __iter__(self): return iter([self])\n"
        "def {name}(x): return Yes()"
    ),
    "a list equal to everything": (
        "class Yes(list):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
        "def {name}(x): return Yes()"
    ),
    "a number equal to everything": (
        "class Yes(float):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
        "    def __sub__(self, other): return Yes(0)\n    __rsub__ = __sub__\n"
        "    def __abs__(self): return Yes(0)\n    def __lt__(self, other): return True\n"
        "    __le__ = __lt__\ndef {name}(x): return Yes(99)"
    ),
    "patched builtins": (
        "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.abs = lambda x: 0\n"
        "builtins.all = lambda x: True\nbuiltins.zip = lambda *a, **k: iter(())\n"
        "builtins.len = lambda x: 0\ndef {name}(x): return 99"
    ),
    "patched math": (
        "import math\nmath.isclose = lambda *a, **k: True\ndef {name}(x): return 99"
    ),
    "a patched judge": (
        "import __main__\n"
        "for name, value in list(vars(__main__).items()):\n"
        "    if callable(value) and not name.startswith('_'):\n"
        "        setattr(__main__, name, lambda *a, **k: True)\n"
        "def {name}(x): return 99"
    ),
    "patched json": (
        "import json\njson.dumps = lambda *a, **k: 'passed'\ndef {name}(x): return 99"
    ),
    "the answers in the frames": (
        "import sys\ndef {name}(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        for space in (frame.f_locals, frame.f_globals):\n"
        "            for key in ('expected', 'results', 'tests', 'reference', 'suite'):\n"
        "                if key in space or key in space.get('task', {{}}):\n"
        "                    value = space.get(key) or space['task'][key]\n"
        "                    return value[0]\n"
        "        frame = frame.f_back"
    ),
    "the answers in memory": (
        "import gc\ndef {name}(x):\n    for thing in gc.get_objects():\n"
        "        if isinstance(thing, dict) and ('expected' in thing or 'tests' in thing):\n"
        "            return eval(str(thing.get('expected') or thing['tests']))[0]"
    ),
    "the answers on standard input": (
        "import os\ndef {name}(x):\n    os.lseek(0, 0, 0)\n"
        "    text = os.read(0, 1 << 20).decode()\n"
        "    return eval(text.split('\"expected\":')[1].split('}}')[0])[0]"
    ),
    "the answers in files": (
        "import glob\ndef {name}(x):\n    for path in glob.glob('/**/*.json*', recursive=True):\n"
        "        if 'mbpp' in path or 'references' in path: return open(path).read()"
    ),
    "a test that skips itself": (
        "import unittest\ndef {name}(x): raise unittest.SkipTest('passed')"
    ),
    "an exception that agrees": "def {name}(x): raise StopIteration(True)",
    "never an end, and no way to stop it": (
        "def {name}(x):\n    while True:\n        try:\n            while True: pass\n"
        "        except BaseException: pass"
    ),
    "a result without an end": (
        "import itertools\ndef {name}(x): return itertools.count()"
    ),
    "a result in itself": "def {name}(x):\n    a = []\n    a.append(a)\n    return a",
    "a fork for every verdict": (
        "import os\ndef {name}(x):\n    for _ in range(50): os.fork()\n    return 99"
    ),
    "more memory than there is": "def {name}(x): return 'x' * (1 << 40)",
    "a crash": "import ctypes\ndef {name}(x): return ctypes.string_at(0)",
    "output without an end": (
        "import os\ndef {name}(x):\n    while True: os.write(1, b'passed\\n' * 4096)"
    ),
    "printing without an end": "def {name}(x):\n    while True: print('x' * 9999)",
    "a wrong answer": "def {name}(x): return 99",
    "no answer": "I do not know.",
}  # fmt: skip
HONEST = {
    "mbpp": ("double", "def double(x): return x + x"),
    "mbpp/sanitized": ("root", "def root(x): return x ** 0.5"),
    "mbpp+": ("pair", "def pair(rows): return [tuple(reversed(row)) for row in rows]"),
    "humaneval": ("mean", "def mean(xs): return sum(xs) / max(len(xs), 1)"),
    "humaneval+": ("mean", "def mean(xs): return sum(xs) / max(len(xs), 1)"),
}
SLOW = ("never an end", "a result without", "printing without", "a fork")


@pytest.fixture(scope="module")
def strict() -> Iterator[Sandbox]:
    with open_sandbox(limits=Limits(seconds=5.0, output_kb=256), workers=2) as opened:
        yield opened


@pytest.mark.parametrize("name", [pytest.param("mbpp", marks=pytest.mark.slow), "mbpp+"])
def test_no_cheat_passes(name: str, judged: Judge, strict: Sandbox) -> None:
    _none_passes(name, judged, strict, [t for t in CHEATS if not t.startswith(SLOW)])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(HONEST))
def test_no_cheat_passes_any_benchmark(name: str, judged: Judge, strict: Sandbox) -> None:
    _none_passes(name, judged, strict, list(CHEATS))


def _none_passes(name: str, judged: Judge, sandbox: Sandbox, titles: list[str]) -> None:
    function, honest = HONEST[name]
    answers = [CHEATS[title].format(name=function) for title in titles]
    # An honest program between any two of them: it passes, whatever its neighbours do.
    verdicts = judged(name, [text for answer in answers for text in (answer, honest)], sandbox)
    assert {t: v for t, v in zip(titles, verdicts[::2], strict=True) if v.base or v.plus} == {}
    assert [v for v in verdicts[1::2] if not v.base or v.plus is False] == []
    assert all(verdict.reason for verdict in verdicts[::2])
