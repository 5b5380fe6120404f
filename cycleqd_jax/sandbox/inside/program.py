"""The last step: this process turns into the program."""

import _thread
import atexit
import builtins
import gc
import linecache
import os
import signal
import site
import sys
import threading
import traceback
from types import ModuleType
from typing import NoReturn

_NAME = "/home/user/program.py"
_SCRIPT = "/home/tmp/script.sh"
_BASH = (b"bash", b"--noprofile", b"--norc")


def prepare() -> None:
    """What every Python program finds, done once before the clones."""
    sys.argv = ["program.py"]
    sys.orig_argv = [sys.executable, "program.py"]
    sys.path[:] = ["/home/user", *(path for path in sys.path if path.startswith(sys.base_prefix))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "inside"]:
        del sys.modules[name]
    site.setquit()
    traceback.format_exception(ValueError("warm"))
    compile("def warm(x):\n    return [x]\nassert warm(1)\n", _NAME, "exec")
    sys.modules["__main__"] = ModuleType("__main__")
    sys.modules["__main__"].__dict__.update(__builtins__=builtins, __file__=_NAME)


def start(python: bool, source: bytes) -> NoReturn:
    """Run the source and exit as an interpreter started on it would."""
    code = 126
    try:
        code = _python(source) if python else _bash(source)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode("utf-8", "replace"))
    finally:
        os._exit(code)


def _bash(source: bytes) -> NoReturn:
    # Python ignores these two; a shell expects its commands to die of them.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if len(source) < 100_000 and b"\0" not in source:
        os.execv("/bin/bash", [*_BASH, b"-c", source, b"bash"])
    # One argument holds 128 KiB at most; a longer script is a file outside the snapshot.
    with open(_SCRIPT, "wb") as file:
        file.write(source)
    os.execv("/bin/bash", [*_BASH, _SCRIPT.encode()])


def _python(source: bytes) -> int:
    gc.enable()
    code = 0
    try:
        exec(
            compile(source, _NAME, "exec", dont_inherit=True),
            sys.modules["__main__"].__dict__,
        )
    except SystemExit as stop:
        code = _exit_code(stop.code)
    except BaseException as error:
        code = 1
        _show(error, source)
    if _thread._count() or atexit._ncallbacks():
        code = _wind_down(code, source)
    _forget_globals()
    try:
        for stream in (sys.stdout, sys.__stdout__, sys.stderr):
            if stream is not None:
                stream.flush()
    except Exception as error:
        print(f"Exception ignored while flushing: {error!r}", file=sys.__stderr__, flush=True)
        code = 120
    return code


def _forget_globals() -> None:
    # As the interpreter does at its end: files that were left open are written out.
    names = sys.modules["__main__"].__dict__
    for private in (True, False):
        for name in list(names):
            if name != "__builtins__" and (not private or name[:1] == "_" != name[1:2]):
                names[name] = None
    gc.collect()


def _exit_code(value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, int):
        return value & 0xFF
    print(value, file=sys.stderr)
    return 1


def _show(error: BaseException, source: bytes) -> None:
    if sys.excepthook is not sys.__excepthook__:
        sys.excepthook(type(error), error, error.__traceback__)
        return
    # The source is not a file in the sandbox, but its lines belong in the traceback.
    lines = source.decode("utf-8", "replace").splitlines(True)
    linecache.cache[_NAME] = (len(source), None, lines, _NAME)
    # The first frame is this file's.
    trace = error.__traceback__ and error.__traceback__.tb_next
    traceback.print_exception(type(error), error, trace)


def _wind_down(code: int, source: bytes) -> int:
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except SystemExit as stop:
        return _exit_code(stop.code)
    except BaseException as error:
        _show(error, source)
    return code
