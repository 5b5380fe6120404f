"""Python programs that mean harm, beside those of test_attacks: each fails, within its limits."""

import errno
import platform

import pytest

from cycleqd_jax.sandbox import Job
from cycleqd_jax.sandbox.inside import filter as seccomp

C = "import ctypes, mmap, os, sys, threading, time\nlibc = ctypes.CDLL(None, use_errno=True)\n"
FORGET = (
    "    for i in range(0, len(m), 4096): m[i] = 1\n    m.madvise(mmap.MADV_DONTNEED)\n"
    "    start = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
    "    libc.munmap(ctypes.c_void_p(start + 4096), ctypes.c_size_t(len(m) - 4096))\n"
    "    keep.append(m)"
)

# (name, source, how it may end): more than its share of something that is counted
GREEDY = [
    ("memory by maps", C + "k = []\nwhile True: k.append(mmap.mmap(-1, 1 << 24, 0x22))", "error"),
    # Pages of shared memory stay while a page of it is mapped, and nobody's resident size has them.
    ("shared memory that nobody maps",
     C + f"keep = []\nfor _ in range(40):\n    m = mmap.mmap(-1, 60 << 20)\n{FORGET}", "error"),
    ("the same from /dev/zero",
     C + "keep, zero = [], os.open('/dev/zero', os.O_RDWR)\nfor _ in range(40):\n"
     f"    m = mmap.mmap(zero, 60 << 20)\n{FORGET}", "error"),
    ("shared memory of a dead child",
     C + "keep = []\nfor _ in range(40):\n    m = mmap.mmap(-1, 60 << 20)\n    keep.append(m)\n"
     "    if os.fork() == 0:\n        for i in range(0, len(m), 4096): m[i] = 1\n"
     "        os._exit(0)\n    os.wait()", "error"),
    # /proc shows no memory of a process whose first thread has ended.
    ("memory behind a dead thread",
     C + "def hold():\n    x = mmap.mmap(-1, 100 << 20, 0x22)\n"
     "    for i in range(0, len(x), 4096): x[i] = 1\n    time.sleep(60)\n"
     "for _ in range(5):\n    if os.fork() == 0:\n"
     "        threading.Thread(target=hold).start()\n        time.sleep(0.01)\n"
     f"        libc.syscall({60 if platform.machine() == 'x86_64' else 93}, 0)\ntime.sleep(60)",
     "killed"),
    ("memory in sockets",
     "import os, socket, time\nkeep = []\nfor _ in range(9):\n    if os.fork() == 0: break\n"
     "try:\n    while True:\n        keep.append(socket.socketpair())\n"
     "        for one in keep[-1]:\n            one.setblocking(False)\n            try:\n"
     "                while True: one.send(bytes(8192))\n            except BlockingIOError: pass\n"
     "except OSError: time.sleep(60)", "killed"),
    # A byte lent to a pipe keeps its whole huge page.
    ("memory lent to pipes",
     C + "class Part(ctypes.Structure):\n"
     "    _fields_ = [('at', ctypes.c_void_p), ('n', ctypes.c_size_t)]\n"
     "for _ in range(100):\n    r, w = os.pipe()\n    for _ in range(16):\n"
     "        m = mmap.mmap(-1, 4 << 20, 0x22)\n        m.madvise(14)\n"
     "        at = ctypes.addressof(ctypes.c_char.from_buffer(m)) + (2 << 20)\n"
     "        m[2 << 20] = 1\n"
     "        if libc.vmsplice(w, ctypes.byref(Part(at, 1)), 1, 0) != 1: sys.exit(1)", "error"),
    ("memory in pipes",
     "import os\nwhile True:\n    r, w = os.pipe()\n    os.set_blocking(w, False)\n    try:\n"
     "        while True: os.write(w, bytes(4096))\n    except BlockingIOError: pass", "error"),
    ("memory of many small ones",
     "import os, time\nfor _ in range(10):\n    if os.fork() == 0:\n"
     "        x = b'x' * (40 << 20); time.sleep(60)\ntime.sleep(60)", "killed"),
    ("huge pages", C + "mmap.mmap(-1, 2 << 20, 0x22 | 0x40000)", "error"),
    ("locked memory", C + "sys.exit(libc.mlockall(3) != 0)", "error"),
    ("large file with a hole", "open('f', 'w').truncate(1 << 40)", "error"),
    ("large file at once", "import os\nos.posix_fallocate(os.open('f', 66), 0, 1 << 40)", "error"),
    ("mapped beyond the disk",
     C + "for n in range(4):\n    f = open(str(n), 'wb+'); f.truncate(4 << 20)\n"
     "    m = mmap.mmap(f.fileno(), 4 << 20)\n    for i in range(0, len(m), 4096): m[i] = 1",
     "killed"),
    ("folders", "import os\nn = 0\nwhile True: os.mkdir(str(n)); n += 1", "error"),
    ("hard links", "import os\nopen('f', 'w')\nn = 0\nwhile True: os.link('f', f'l{n}'); n += 1",
     "error"),
    ("symbolic links", "import os\nn = 0\nwhile True: os.symlink('x' * 2000, str(n)); n += 1",
     "error"),
    ("attributes of a file",
     "import os\nopen('f', 'w')\n"
     "for n in range(9999): os.setxattr('f', f'user.{n}', b'x' * 4000)", "error"),
    ("long names",
     "import os\nn = 0\nwhile True: open(f'{n:04}\\n' + '\\x1b[2J' * 50, 'w'); n += 1", "error"),
    ("descriptors", "import os\nwhile True: os.dup(0)", "error"),
    ("arguments", "import os\nos.execv('/bin/true', ['x' * 100000] * 1000)", "error"),
    ("environment",
     "import os\nos.execve('/bin/true', ['x'], {str(n): 'x' * 99999 for n in range(99)})", "error"),
    ("line of 1 GB", "import os\nwhile True: os.write(1, b'x' * (1 << 20))", "killed"),
    ("line of 1 GB in errors", "import os\nwhile True: os.write(2, b'x' * (1 << 20))", "killed"),
    ("output of threads",
     "import os, threading\ndef f():\n    while True: os.write(1, b'x' * 999)\n"
     "for _ in range(5): threading.Thread(target=f).start()", "killed"),
    ("nested text", "eval('(' * 30000)", "error"),
    ("nested text for C", "import json; json.loads('[' * 1000000)", "error"),
    ("recursion without a limit",
     "import sys\nsys.setrecursionlimit(1 << 30)\nclass A:\n"
     "    def __getattr__(self, n): return getattr(self, n)\nA().x", "killed"),
    ("abort", "import os; os.abort()", "killed"),
    ("exit code of a signal", "import os; os._exit(137)", "error"),
]  # fmt: skip

# Programs that do not want to end.
ENDLESS = [
    ("at exit", "import atexit, time\natexit.register(time.sleep, 60)"),
    ("thread", "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"),
    ("exit in a thread",
     "import sys, threading, time\nthreading.Thread(target=sys.exit).start()\ntime.sleep(60)"),
    ("last words", "import sys, time\nsys.excepthook = lambda *_: time.sleep(60)\n1 / 0"),
    ("destructor",
     "import time\nclass A:\n    def __del__(self, sleep=time.sleep): sleep(60)\na = A()"),
    ("flush",
     "import sys, time\nclass A:\n    def flush(self, sleep=time.sleep): sleep(60)\n"
     "sys.stdout = A()"),
    ("catches the end",
     "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: None)\n"
     "while True:\n    try: time.sleep(60)\n    except BaseException: pass"),
    ("stopped child",
     "import os, signal, time\npid = os.fork()\nif pid == 0: time.sleep(60)\n"
     "os.kill(pid, signal.SIGSTOP)\nos.waitpid(pid, 0)"),
    ("reads its own output",
     "import os; print('x', flush=True)\nwhile True: os.read(os.open('/dev/stdout', 0), 9)"),
    ("closed descriptors", "import os, time\nos.closerange(0, 256)\ntime.sleep(60)"),
    ("other descriptors",
     "import os, time\nr, w = os.pipe()\nfor n in range(3): os.dup2(w, n)\ntime.sleep(60)"),
    ("orphans that hold the output",
     "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        os.setsid()\n"
     "        time.sleep(60)\ntime.sleep(60)"),
    ("waits for itself", "import threading; a = threading.Lock(); a.acquire(); a.acquire()"),
]  # fmt: skip

# The same, at the cost of a processor.
BUSY = [
    ("regular expression", "import re; re.match('(a|aa)+$', 'a' * 99 + 'b')"),
    ("one long operation", "9 ** 9 ** 9"),
    ("flood of signals",
     "import os, signal\nsignal.signal(signal.SIGUSR1, lambda *_: None)\n"
     "while True: os.kill(os.getpid(), signal.SIGUSR1)"),
    ("short lives", "import os\nwhile True:\n    if os.fork() == 0: os._exit(0)\n    os.wait()"),
    ("reads everything",
     "import os\nwhile True:\n    for folder, _, names in os.walk('/usr/lib'):\n"
     "        for name in names:\n            try: open(os.path.join(folder, name), 'rb').read(9)\n"
     "            except OSError: pass"),
    ("names that are not there",
     "import os\nn = 0\nwhile True: os.path.exists(f'/usr/{n}'); n += 1"),
    ("turns of the memory", "import mmap\nwhile True: mmap.mmap(-1, 1 << 26, 0x22)[::4096]"),
]  # fmt: skip

# What is not there or not allowed: the program fails, or would say so with exit code 0.
FORBIDDEN = [
    ("network by name", "import socket; socket.getaddrinfo('example.com', 80)"),
    ("network of datagrams",
     "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))"),
    ("network IPv6", "import socket; socket.create_connection(('2606:4700:4700::1111', 80), 1)"),
    ("raw network", "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW)"),
    ("packets", "import socket; socket.socket(17, socket.SOCK_RAW)"),
    ("network settings", "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)"),
    ("network of the machine below", "import socket; socket.socket(socket.AF_VSOCK)"),
    ("ciphers of the kernel", "import socket; socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)"),
    ("pair of another family", "import socket; socket.socketpair(socket.AF_INET)"),
    ("name for a pair",
     "import socket\na, _ = socket.socketpair(type=socket.SOCK_DGRAM)\na.bind('\\0meet-me')"),
    ("address for a pair",
     "import socket\na, _ = socket.socketpair(type=socket.SOCK_DGRAM)\na.connect('/tmp/s')"),
    ("larger buffers",
     "from socket import *\na, _ = socketpair()\na.setsockopt(SOL_SOCKET, SO_SNDBUF, 1 << 22)"),
    ("neighbour's memory",
     "import os\nif os.fork():\n    os.wait()\nopen('/proc/1/mem', 'r+b')"),
    ("root of the first process", "open('/proc/1/root/etc/shadow')"),
    ("the interpreter by /proc", "open('/proc/self/exe', 'r+b')"),
    ("share of the processor", "open('/proc/self/autogroup', 'w').write('19')"),
    ("out-of-memory score", "open('/proc/self/oom_score_adj', 'w').write('-1000')"),
    ("map of users", "open('/proc/self/uid_map', 'w').write('0 0 1')"),
    ("semaphores of all", "open('/proc/sys/kernel/sem', 'w').write('1 1 1 1')"),
    ("where crashes go", "open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/sh')"),
    ("namespace of the first process",
     C + "fd = os.open('/proc/1/ns/mnt', 0)\nsys.exit(libc.setns(fd, 0) != 0)"),
    ("new user namespace", C + "sys.exit(libc.unshare(0x10000000) != 0)"),
    ("clone into a user namespace",
     C + "n = 56 if os.uname().machine == 'x86_64' else 220\n"
     "sys.exit(libc.syscall(n, 0x10000000 | 17, 0, 0, 0, 0) < 0)"),
    ("process limit",
     "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (999, 999))"),
    ("file limit", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))"),
    ("descriptor limit",
     "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (9999, 9999))"),
    ("processor limit", "import resource; resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))"),
    ("priority", "import os; os.setpriority(os.PRIO_PROCESS, 0, -5)"),
    ("real time", "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"),
    ("clock", "import time; time.clock_settime(time.CLOCK_REALTIME, 0)"),
    ("owner", "import os; open('f', 'w'); os.chown('f', 0, 0)"),
    ("groups", "import os; os.setgroups([0])"),
    ("device", "import os; os.mknod('d', 0o60600, os.makedev(8, 0))"),
    ("hard link to the outside", "import os; os.link('/etc/passwd', 'x')"),
    ("write through a link", "import os; os.symlink('/usr/bin/x', 'x'); open('x', 'w')"),
    ("write through a folder", "import os; open('/home/user/../../etc/x', 'w')"),
    ("rename the home", "import os; os.rename('/home', '/gone')"),
    ("terminal", "open('/dev/tty', 'w')"),
    ("type on a terminal", "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSTI, b'x')"),
    ("memory of the machine", "open('/dev/mem', 'rb')"),
    ("disk of the machine", "import glob; open((glob.glob('/dev/[svn][dv]*') or ['/dev/sda'])[0])"),
    ("time stamp of a device", "import os; os.utime('/dev/null')"),
]  # fmt: skip


@pytest.mark.slow
def test_greedy_programs_end_within_their_limits(roomy, untouched):
    with untouched():
        outcomes = roomy.run([Job("python", source, snapshot=True) for _, source, _ in GREEDY])
    ends = {name: end for name, _, end in GREEDY}
    assert {n: o.status for n, o in zip(ends, outcomes, strict=True)} == ends, outcomes
    assert all(len(outcome.stdout) <= 64 << 10 for outcome in outcomes)
    assert roomy.run([Job("python", "print(6 * 7)")])[0].stdout == "42\n"


@pytest.mark.slow
@pytest.mark.parametrize("endless", [ENDLESS, BUSY], ids=["idle", "busy"])
def test_endless_programs_end_in_time(endless, hasty, untouched):
    with untouched():
        outcomes = hasty.run([Job("python", source) for _, source in endless])
    ends = {name: o.status for (name, _), o in zip(endless, outcomes, strict=True)}
    assert ends == dict.fromkeys(ends, "timeout")
    assert hasty.run([Job("python", "print(6 * 7)")])[0].stdout == "42\n"


def test_forbidden_acts_fail(roomy, untouched):
    with untouched():
        outcomes = roomy.run([Job("python", source) for _, source in FORBIDDEN])
    allowed = {
        name: outcome
        for (name, _), outcome in zip(FORBIDDEN, outcomes, strict=True)
        if outcome.status != "error"
    }
    assert allowed == {}


def test_every_refused_call_is_refused(roomy):
    column = 0 if platform.machine() == "x86_64" else 1
    numbers = {name: pair[column] for name, pair in seccomp._REFUSED.items()}
    # With arguments that none of them would take, so that a hole does no harm either.
    source = (
        f"{C}for name, number in {numbers}.items():\n"
        "    done = libc.syscall(number, -1, -1, -1, -1, -1, -1)\n"
        f"    if done != -1 or ctypes.get_errno() != {errno.EPERM}: print(name, done)\n"
    )
    outcome = roomy.run([Job("python", source)])[0]
    assert (outcome.status, outcome.stdout) == ("ok", "")


def test_what_programs_need_is_still_there(roomy):
    source = (
        "import asyncio, mmap, multiprocessing, shutil, socket\n"
        "a, b = socket.socketpair()\na.send(b'x')\nprint(b.recv(9))\n"
        "asyncio.run(asyncio.sleep(0))\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool: print(pool.map(abs, [-1, 2]))\n"
        "open('f', 'w').write('x' * 9999)\nshutil.copy('f', 'g')\nfile = open('g', 'r+b')\n"
        "print(len(mmap.mmap(file.fileno(), 0)), len(mmap.mmap(-1, 99, mmap.MAP_PRIVATE)))\n"
        "print(open('/dev/zero', 'rb').read(3))\n"
    )
    outcome = roomy.run([Job("python", source)])[0]
    assert outcome.stdout == "b'x'\n[1, 2]\n9999 99\nb'\\x00\\x00\\x00'\n", outcome.stderr
