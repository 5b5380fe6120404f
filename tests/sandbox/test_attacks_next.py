"""Programs that aim at the ones after them: those meet the same world and get the same time."""

import pytest

from cycleqd_jax.sandbox import Job

# What a program can see of the state that it shares with others, or that it inherits.
WORLD = """
import builtins, decimal, fcntl, gc, json, locale, os, random, resource, signal, sys, threading
print(sorted(vars(builtins)), print, json.dumps([1.5, 'x']), sorted(sys.modules), sys.path)
print(sorted(os.environ.items()), os.getcwd(), sorted(os.listdir('.')), sorted(os.listdir('/tmp')))
print([signal.getsignal(n) for n in range(1, 32)], signal.pthread_sigmask(signal.SIG_BLOCK, []))
print([fcntl.fcntl(fd, what) for fd in (0, 1, 2) for what in (fcntl.F_GETFD, fcntl.F_GETFL, 9, 11)])
print([resource.getrlimit(n) for n in range(16)], os.nice(0), os.sched_getaffinity(0))
print(os.umask(0), gc.isenabled(), gc.get_threshold(), sys.getrecursionlimit(), random.random())
print(decimal.getcontext(), locale.getlocale(), threading.active_count(), sys.getswitchinterval())
print(os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), os.getpid(), os.getpgid(0))
for name in ('autogroup', 'oom_score_adj', 'comm', 'coredump_filter', 'timerslack_ns', 'limits'):
    if os.path.exists(f'/proc/self/{name}'): print(open(f'/proc/self/{name}').read())
for name in ('kernel/sem', 'kernel/shmmax', 'kernel/msgmax', 'kernel/hostname'):
    print(open(f'/proc/sys/{name}').read())
print(sum([1, 2]), 'x' * 2, [] == [], {}.get(1), int('7'), (1).__add__(1), 2 ** 10, hash('a'))
"""

POISON = {
    "builtins": """
import builtins
for name in list(vars(builtins)): setattr(builtins, name, None)""",
    "modules": """
import sys
for module in list(sys.modules.values()):
    try: module.__dict__.clear()
    except BaseException: pass""",
    "list of modules": """
import sys
sys.modules.clear(); sys.path[:] = ['/tmp']; sys.meta_path.clear()""",
    "functions": """
import json, os, random
json.dumps.__code__ = (lambda *a, **k: 'evil').__code__
random.random = lambda: 4
os.listdir = lambda p: []
random.seed(5)""",
    "small numbers": """
import ctypes
ctypes.memmove(id(7) + 24, (9).to_bytes(4, 'little'), 4)""",
    "classes": """
import ctypes, gc
gc.get_referents(str.__dict__)[0]['upper'] = None
gc.get_referents(list.__dict__)[0].clear()""",
    "memory": """
import ctypes
for line in open('/proc/self/maps'):
    span, rights = line.split()[:2]
    if 'w' in rights and 'heap' in line:
        start, end = (int(x, 16) for x in span.split('-'))
        ctypes.memset(start, 0, end - start)""",
    "code by /proc": """
for line in open('/proc/self/maps'):
    if 'r-xp' in line:
        file = open('/proc/self/mem', 'r+b', 0)
        file.seek(int(line.split('-')[0], 16))
        file.write(b'x')""",
    "signals": """
import signal
for n in range(1, 32):
    try: signal.signal(n, signal.SIG_IGN)
    except OSError: pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))""",
    "standard input": """
import fcntl, os
fcntl.fcntl(0, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND)
fcntl.fcntl(0, 10, 42)  # F_SETSIG
fcntl.flock(0, fcntl.LOCK_EX)""",
    "descriptors": """
import os
for fd in range(256):
    try: os.write(fd, b'+' * 99)
    except OSError: pass
os.closerange(0, 256)""",
    "limits": """
import resource
for n in range(16): resource.setrlimit(n, (0, 0))""",
    "process": """
import os
os.nice(19); os.umask(0o777); os.chdir('/')
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)); os.sched_setaffinity(0, {0})""",
    "interpreter": """
import decimal, gc, sys, threading
gc.disable(); gc.set_threshold(1); sys.setswitchinterval(9); sys.setrecursionlimit(99)
decimal.getcontext().prec = 2; threading.stack_size(1 << 20)
sys.setprofile(print); sys.addaudithook(lambda *a: 1 / 0)""",
    "environment": """
import ctypes, os
os.environ.clear(); ctypes.CDLL(None).clearenv(); os.putenv('PATH', '/tmp')""",
    "settings": """
import glob
own = [f'/proc/self/{name}' for name in ('autogroup', 'oom_score_adj', 'timerslack_ns', 'comm')]
for path in own + glob.glob('/proc/sys/**', recursive=True):
    try: open(path, 'w').write('19')
    except OSError: pass""",
    "files": """
import os
for folder in ('/tmp', '/home', '.', '/dev/shm', '/'):
    for name in ('json.py', 'random.py', 'x'):
        try: open(os.path.join(folder, name), 'w').write('1/0')
        except OSError: pass
os.chmod('/home', 0)""",
    "callers": """
import sys
frame = sys._getframe()
while frame:
    for value in list(frame.f_locals.values()):
        try: vars(value).clear()
        except BaseException: pass
    frame = frame.f_back""",
    "its end": """
import atexit, os, threading
threading._shutdown = lambda: os._exit(0)
atexit.register(os.abort)""",
    "crash": "import ctypes; ctypes.string_at(1)",
}


def test_nothing_reaches_the_next_program(single, untouched):
    look = Job("python", WORLD)
    (before,) = single.run([look])
    assert (before.status, before.stderr) == ("ok", "")
    with untouched():
        # One worker: each look is at what the program before it has left.
        jobs = [job for source in POISON.values() for job in (Job("python", source), look)]
        after = single.run(jobs)[1::2]
    changed = {name: o for name, o in zip(POISON, after, strict=True) if o != before}
    assert changed == {}


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("python",
         "import os, time\nos.closerange(0, 3)\ntime.sleep(0.3)\n"
         "open('end', 'w').write(str(time.monotonic()))"),
        ("bash",
         "exec <&- >&- 2>&-; sleep 0.3; python3 -c 'import time; print(time.monotonic())' > end"),
    ],
)  # fmt: skip
def test_a_program_that_closes_its_output_still_has_its_turn(single, kind, source):
    when = Job("python", "import time; print(time.monotonic())")
    silent, next_one = single.run([Job(kind, source, snapshot=True), when])
    assert silent.status == "ok"
    assert float(silent.files["end"]) < float(next_one.stdout)
