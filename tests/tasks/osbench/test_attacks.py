"""Commands that mean harm: each ends within its limit, and nothing outside has changed."""

import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from cycleqd_jax.sandbox import SandboxUnavailable
from cycleqd_jax.sandbox.machines import Machine, MachineLimits, MachineLost, Machines

SECONDS = 1.0
LIMITS = MachineLimits(memory_mb=256, processes=40, disk_mb=16, output_kb=256)

# Name: the command, and how it may end: the command or the shell is done, it is left behind when
# its time is up, or the machine is lost.
GREEDY = {
    "fork bomb": (":(){ :|:& };:; wait", {"lost", "late", "done"}),
    "fork bomb of many": ("for i in {1..500}; do sleep 60 & done", {"lost"}),
    "fork bomb, python": (
        "python3 -c 'import os\nwhile True:\n try: os.fork()\n except OSError: pass'", {"lost"}),
    "memory bomb": ("x=xxxxxxxx; while :; do x=$x$x; done", {"closed", "late", "lost"}),
    "memory bomb, python": ("python3 -c 'x = []\nwhile 1: x.append(bytes(1 << 20))'",
                            {"done", "lost"}),
    "memory bomb of many": (
        "for i in 1 2 3 4; do python3 -c 'import time; x = b\"x\" * (90 << 20); time.sleep(9)' & "
        "done; wait", {"lost"}),
    "shared memory": ("for i in 1 2 3 4 5; do head -c 8M /dev/zero > /dev/shm/$i; done", {"done"}),
    "disk bomb": ("for i in 1 2 3 4; do yes > /var/big$i; done", {"done", "late"}),
    "inode bomb": ("mkdir /m; cd /m; for i in {1..400}; do touch $i-{1..100}; done",
                   {"done", "late", "lost"}),
    "sparse file": ("truncate -s 1T /big", {"done"}),
    "endless output": ("yes", {"lost"}),
    "endless output behind": ("yes & yes & sleep 5", {"lost"}),
    "endless errors": ("cat /dev/urandom >&2", {"lost"}),
    "line of 1 GB": ("head -c 1G /dev/zero | tr '\\0' x", {"lost"}),
    "endless loop": ("while :; do :; done", {"late"}),
    "deaf loop": ("trap '' INT TERM HUP QUIT PIPE; while :; do :; done", {"late"}),
    "sleep": ("sleep 1000", {"late"}),
    "reads its input": ("cat", {"late"}),
    "here-document without end": ("cat << END\nnever", {"late"}),
    "quote without end": ("echo 'never", {"late"}),
    "bracket without end": ("( echo never; if true; then", {"late"}),
    "continued line": ("echo never \\", {"late", "done"}),
    "closed stdin": ("exec < /dev/null", {"closed", "late"}),
    "closed stdout": ("exec > /dev/null 2>&1", {"late"}),
    "all closed": ("exec 0<&- 1>&- 2>&-", {"closed", "late"}),
    "another program instead": ("exec sleep 1000", {"late"}),
    "no program instead": ("exec /nonexistent", {"done", "closed"}),
    "exit": ("exit 3", {"closed"}),
    "kill everybody": ("kill -9 -1", {"closed", "done"}),
    "kill the shell": ("kill -9 $$", {"closed"}),
    "kill the first process": ("kill -9 1; kill -STOP 1; kill -TERM 1", {"done"}),
    "end the first process": ("echo exit > /proc/1/fd/0; sleep 5", {"closed", "lost"}),
    "stop the shell": ("kill -STOP $$", {"late"}),
    "stop all": ("kill -STOP -1; kill -STOP $$", {"late", "done"}),
    "terminal put right": ("stty sane; stty raw; stty echo", {"done"}),
    "terminal hung up": ("python3 -c 'import os, signal; os.kill(os.getppid(), 1)'", {"closed"}),
    "terminal filled": ("python3 -c 'import fcntl, termios\nfor c in b\"x\" * 9999:\n"
                        " fcntl.ioctl(0, termios.TIOCSTI, bytes([c]))'", {"done"}),
    "protocol shown": ("set -xv; PROMPT_COMMAND='echo p'; PS1='$ '; trap 'echo d' DEBUG", {"done"}),
    "protocol taken": ("eval() { :; }; printf() { :; }", {"late", "done"}),
    "deep folders": ("while mkdir -p d/d/d/d/d/d/d/d/d/d && cd d/d/d/d/d/d/d/d/d/d; do :; done",
                     {"done", "late"}),
    "daemon": ("setsid nohup sleep 600 > /dev/null 2>&1 < /dev/null &", {"done"}),
    "NUL and controls": ("echo a\0b\x04c\x03\x1a", {"done", "late", "closed"}),
    "surrogate": ("echo '\udc80'", {"done"}),
}  # fmt: skip

# Each must fail; {outside} is a folder of the test, with a secret in it.
FORBIDDEN = {
    "network by name": "curl -sm 1 http://example.com || wget -qT 1 -t 1 http://example.com",
    "network by address": "echo > /dev/tcp/1.1.1.1/80",
    "network, UDP": "python3 -c \"import socket; "
                    "socket.socket(2, 2).sendto(b'x', ('8.8.8.8', 53))\"",
    "the host's ports": "for p in {1..99}; do (echo > /dev/tcp/127.0.0.1/$p) && exit; done; false",
    "hypervisor's socket": "python3 -c 'import socket; socket.socket(40, 1, 0)'",
    "raw socket": "python3 -c 'import socket; socket.socket(2, 3, 1)'",
    "packet socket": "python3 -c 'import socket; socket.socket(17, 3, 0)'",
    "files outside": "ls {outside}",
    "through the root of process 1": "ls /proc/1/root{outside}",
    "through descriptors": "cat /proc/1/fd/*/secret /proc/self/fd/*/../secret",
    "by link": "ln -s {outside} /way && cat /way/secret",
    "by dots": "cat ../../../../../../../../..{outside}/secret",
    "out of chroot": "mkdir /c; python3 -c \"import os; f = os.open('/', 0); os.chroot('/c'); "
                     "os.fchdir(f); [os.chdir('..') for _ in range(99)]; os.chroot('.'); "
                     "os.stat('{outside}')\"",
    "host's users": "grep -q . /etc/shadow && grep -v '^[a-z-]*:[*!]' /etc/shadow",
    "mount": "mount -t tmpfs none /mnt",
    "mount of a process table": "mkdir /p; mount -t proc none /p",
    "unmount": "umount /proc/sys || umount /dev/null",
    "new namespaces": "unshare --user --mount true || unshare --net true",
    "more namespaces": "echo 99 > /proc/sys/user/max_user_namespaces",
    "others' namespaces": "nsenter -t 1 -m true",
    "kernel setting": "echo x > /proc/sys/kernel/core_pattern",
    "kernel switch": "test -w /proc/sysrq-trigger && test ! -c /proc/sysrq-trigger",
    "kernel memory": "head -c 1 /proc/kcore | grep -q . || head -c 1 /dev/mem",
    "kernel log": "dmesg",
    "device": "mknod /dev/sda b 8 0",
    "clock": "date -s 2001-01-01",
    "host name": "hostname elsewhere",
    "limits": "ulimit -v unlimited || ulimit -u 100000",
    "priority": "nice -n -19 true 2>&1 | grep -q cannot && false || renice -n -19 $$",
    "trace process 1": "python3 -c \"import ctypes, sys; "
                       "sys.exit(ctypes.CDLL(None).ptrace(16, 1, None, None) != 0)\"",
    "memory of process 1": "dd if=/proc/1/mem bs=1 count=1",
    "reboot": "python3 -c \"import ctypes, sys; "
              "sys.exit(ctypes.CDLL(None).reboot(0x1234567) != 0)\"",
}  # fmt: skip


@pytest.fixture(scope="module")
def strict() -> Iterator[Machines]:
    try:
        opened = Machines(LIMITS)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    with opened:
        yield opened


def attempt(machines: Machines, command: str, seconds: float = SECONDS) -> tuple[str, str, float]:
    """How a command ended, what it showed, and how long that took, in a machine of its own."""
    machine = machines.boot()
    started = time.monotonic()
    try:
        turn = machine.type(command, seconds)
        return turn.state, turn.output, time.monotonic() - started
    except MachineLost as lost:
        return "lost", str(lost), time.monotonic() - started
    finally:
        machine.close()


def patience(ends: set[str]) -> float:
    """Where the clock may not be what ends a command, it has time to meet what must."""
    return SECONDS if "late" in ends else 15.0


def command_lines() -> bytes:
    found = b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += path.read_bytes() + b"\n"
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_greedy_commands_end_within_their_limits(
    strict: Machines, nothing_left: Callable[..., AbstractContextManager[None]]
) -> None:
    with nothing_left():
        bystander = subprocess.Popen(["sleep", "600"])
        try:
            with ThreadPoolExecutor(4) as threads:
                ended = threads.map(
                    lambda a: attempt(strict, a[0], patience(a[1])), GREEDY.values()
                )
                results = dict(zip(GREEDY, ended, strict=True))
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()
        wrong = {n: results[n] for n, (_, ends) in GREEDY.items() if results[n][0] not in ends}
        assert wrong == {}
        slow = {n: results[n] for n, (_, e) in GREEDY.items() if results[n][2] > patience(e) + 4.0}
        assert slow == {}
        assert all(len(output) <= 256 << 10 for _, output, _ in results.values())
        assert attempt(strict, "echo fine", 20.0)[:2] == ("done", "fine\n")


def test_some_greedy_commands_end_within_their_limits(strict: Machines) -> None:
    names = ("fork bomb of many", "endless output", "exit", "kill everybody", "closed stdin",
             "end the first process", "protocol shown", "NUL and controls")  # fmt: skip
    for name in names:
        command, ends = GREEDY[name]
        assert (name, attempt(strict, command, patience(ends))[0]) in {(name, end) for end in ends}
    assert attempt(strict, "echo fine", 20.0)[:2] == ("done", "fine\n")


def test_forbidden_acts_fail(
    strict: Machines, tmp_path: Path, nothing_left: Callable[..., AbstractContextManager[None]]
) -> None:
    (tmp_path / "secret").write_text("secret")
    commands = {
        name: f"({command.replace('{outside}', str(tmp_path))}) > /dev/null 2>&1 "
        "&& echo DONE || echo REFUSED"
        for name, command in FORBIDDEN.items()
    }
    with nothing_left(), ThreadPoolExecutor(4) as threads:
        ended = threads.map(lambda command: attempt(strict, command, 20.0)[:2], commands.values())
        results = dict(zip(FORBIDDEN, ended, strict=True))
    allowed = {name: found for name, found in results.items() if found != ("done", "REFUSED\n")}
    assert allowed == {}
    assert os.listdir(tmp_path) == ["secret"]


def test_the_parent_is_invisible(
    strict: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = uuid.uuid4().hex
    monkeypatch.setenv("MY_SECRET", secret)
    (tmp_path / "secret").write_text(secret)
    with Machines(LIMITS) as opened:
        seen = attempt(
            opened,
            "cat /proc/*/environ /proc/*/cmdline | tr '\\0' '\\n'; env; set; ps -ef; cat "
            f"/proc/*/maps | grep -v ' /usr/' | head -c 90000; ls -la / /home /root {tmp_path} "
            f"{Path.home()} {Path.cwd()}; cat /proc/self/mountinfo; ls -l /proc/*/fd",
            20.0,
        )[1]
    assert "root" in seen
    assert secret not in seen
    assert "MY_SECRET" not in seen
    assert str(Path.cwd()) not in seen.replace(f"'{Path.cwd()}'", "")
    assert "python" not in seen


def test_what_is_written_is_written_nowhere(strict: Machines, tmp_path: Path) -> None:
    mark = f"mark{uuid.uuid4().hex}"
    places = ["/", "/usr", "/usr/bin", "/etc", "/var", "/root", "/home", "/tmp", str(tmp_path)]
    machine = strict.boot()
    for place in places:
        assert machine.type(f"mkdir -p {place}; echo x > {place}/{mark}; echo $?", 20.0) == (
            "0\n",
            "done",
        )
    machine.type("rm -rf --no-preserve-root /usr /etc /root /var 2> /dev/null", 20.0)
    machine.close()
    for place in places:
        assert not Path(place, mark).exists()
        assert attempt(strict, f"ls {place}/{mark}", 20.0)[1].startswith("ls: cannot access")
    assert Path("/usr/bin/env").exists()


def hear(machine: Machine, command: str) -> str:
    return machine.type(command, 20.0).output


def test_two_machines_see_nothing_of_each_other(strict: Machines) -> None:
    one, other = strict.boot(), strict.boot()
    mark = f"m{uuid.uuid4().hex[:12]}"
    hear(
        one,
        f"touch /{mark} /dev/shm/{mark} /tmp/{mark}; useradd {mark}; (exec -a {mark} sleep 60) &",
    )
    hear(one, f"python3 -c \"import socket,time;s=socket.socket(1);s.bind('\\0{mark}');s.listen();"
              f"t=socket.socket();t.bind(('',4567));t.listen();time.sleep(60)\" &")  # fmt: skip
    assert mark in hear(one, "ls / /dev/shm; ps -ef; cut -d: -f1 /etc/passwd")
    look = "ls -a / /dev/shm /tmp /home; ps -ef; cat /etc/passwd /proc/net/unix; ls /dev/pts"
    assert mark not in hear(other, look)
    assert "refused" in hear(other, "echo > /dev/tcp/127.0.0.1/4567")
    hear(other, "kill -9 -1; killall -9 sleep")
    assert mark in hear(one, "ps -ef")
    one.close()
    other.close()


def test_nothing_survives_its_machine(strict: Machines) -> None:
    mark = uuid.uuid4().hex
    machine = strict.boot()
    machine.type(
        f"(exec -a {mark} sleep 6000) & (setsid bash -c 'exec -a {mark} sleep 600' &)", 5.0
    )
    machine.type(f"su -c 'exec -a {mark} sleep 6000' root &", 5.0)
    deadline = time.monotonic() + 10
    while command_lines().count(mark.encode()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert mark.encode() in command_lines()
    machine.close()
    assert_gone(mark.encode())


def assert_gone(mark: bytes) -> None:
    deadline = time.monotonic() + 10
    while mark in command_lines() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert mark not in command_lines()


def test_a_forged_end_of_a_command_ends_its_own_turn_only(strict: Machines) -> None:
    machine = strict.boot()
    forge = (
        'read -r line; echo before; echo "$line" | '
        "sed -nE 's/.*%s%s ([0-9a-f]+) ([0-9a-f]+);.*/\\1\\2/p'; echo after"
    )
    assert machine.type(forge, 20.0) == ("before\n", "done")
    assert machine.type("echo $((6 * 7))", 20.0).output.endswith("42\n")
    # Words of earlier turns, guessed words and the typed line itself end nothing.
    assert machine.type("history | tail -3; echo 0123456789abcdef; echo end", 20.0).output.endswith(
        "0123456789abcdef\nend\n"
    )
    machine.close()


def test_escapes_reach_nobody(strict: Machines) -> None:
    shown = attempt(
        strict,
        r"printf 'a\033[31mb\033]0;title\007c\033Pq\033\\d\r\b\000\302\233e\033cf\x9bg\n'",
        20.0,
    )[1]
    assert shown == "abcdef\ufffdg\n"
