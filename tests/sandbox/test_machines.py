"""Private machines: what carries over, what ends them, and that nothing is left."""

import os
import subprocess

import pytest

from cycleqd_jax.sandbox import SandboxBroken, SandboxUnavailable
from cycleqd_jax.sandbox.inside.turn import Turns
from cycleqd_jax.sandbox.machines import Machine, MachineLimits, MachineLost, Machines

NOBODY = 65534
SOURCE = """
import sys
sys.path.insert(0, {folder!r})
from cycleqd_jax.sandbox.machines import Machines
with Machines() as opened:
    machine = opened.boot()
    command = "id -un; touch /usr/x; stat -c '%A %U %G' /usr/bin/env"
    print(opened.users, machine.type(command, 20.0))
    machine.close()
"""


@pytest.fixture(scope="module")
def machines():
    try:
        opened = Machines(MachineLimits(memory_mb=256))
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    with opened:
        yield opened


@pytest.fixture
def machine(machines):
    booted = machines.boot()
    yield booted
    booted.close()


@pytest.mark.parametrize("name", ["memory_mb", "processes", "disk_mb", "output_kb"])
def test_a_limit_that_is_not_positive_is_an_error(name):
    with pytest.raises(ValueError, match=f"MachineLimits.{name}: expected a positive number"):
        MachineLimits(**{name: 0})


def test_state_carries_over_and_so_does_the_status(machine):
    assert machine.type("cd /usr; x=1; export y=2; f() { return 7; }", 20.0) == ("", "done")
    assert machine.type("pwd; echo $x; bash -c 'echo $y'; f", 20.0) == ("/usr\n1\n2\n", "done")
    assert machine.type("echo $?", 20.0).output == "7\n"
    assert machine.run(["bash", "-c", "pwd; echo $y$HOME"], 20.0) == (0, "/\n/root\n")


def test_long_commands_and_long_lines_arrive_whole(machine):
    lines = "\n".join(f"line {number} é" for number in range(3000))
    assert machine.type(f"cat > /f << 'END'\n{lines}\nEND\nwc -l < /f; tail -1 /f", 20.0) == (
        "3000\nline 2999 é\n",
        "done",
    )
    assert machine.type(f"echo {'x' * 20_000} | wc -c", 20.0).output == "20001\n"


def test_tabs_and_control_characters_are_text(machine):
    assert machine.type("echo 'a\tb' | od -An -c", 20.0).output.split() == ["a", "\\t", "b", "\\n"]


def test_a_full_disk_is_an_error_of_the_command(machines):
    with Machines(MachineLimits(disk_mb=4)) as small:
        machine = small.boot()
        shown = machine.type("for i in 1 2 3; do head -c 3M /dev/zero > /f$i; done", 20.0)
        assert "No space left" in shown.output
        assert machine.type("rm /f*; echo x > /f; cat /f", 20.0).output == "x\n"
        machine.close()


def test_a_lost_machine_says_why_again_and_again(machine):
    for _ in range(2):
        with pytest.raises(MachineLost, match="output limit"):
            machine.type("yes", 20.0)
    with pytest.raises(MachineLost, match="output limit"):
        machine.run(["true"], 20.0)


def test_a_dead_hall_is_no_agents_fault(machines):
    opened = Machines()
    opened._process.kill()
    opened._process.wait()
    with pytest.raises(SandboxBroken, match="no machine starts any more"):
        opened.boot()
    opened.close()


def test_a_machine_that_proves_nothing_is_closed(machines, monkeypatch):
    tried = []

    def lost(machine, command, seconds):
        tried.append(machine)
        raise MachineLost("it ended")

    monkeypatch.setattr(Machine, "type", lost)
    with pytest.raises(SandboxUnavailable, match="No private machine works: it ended"):
        Machines()
    assert [machine._channel.fileno() for machine in tried] == [-1]


def test_nothing_is_left_after_close(machines, nothing_left):
    with nothing_left():
        opened = Machines()
        booted = [opened.boot() for _ in range(4)]
        for one in booted:
            one.type("sleep 600 &", 20.0)
        group = opened._process.pid
        opened.close()
        for one in booted:
            one.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


def test_the_end_of_a_turn_is_typed_nowhere():
    turns = Turns()
    typed = turns.type("cat")
    assert turns.length(typed) == -1
    left, right = turns._words[-1]
    assert turns.length(f"out{left}{right}".encode()) == 3
    assert turns.show(typed) == "cat\n"
    turns.type("next")
    assert turns.length(f"{left}{right}".encode()) == -1
    assert turns.show(f"a\n{left}{right}b".encode()) == "a\nb"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="every test of this room runs as an ordinary user")
def test_an_ordinary_user_is_root_inside(public_copy):
    python = "/usr/bin/python3"
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    if subprocess.run([python, "-c", check], check=False).returncode:
        pytest.skip("no Python 3.11 that an ordinary user may run")
    done = subprocess.run(
        [python, "-I", "-B", "-c", SOURCE.format(folder=public_copy)],
        user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.startswith("False Turn(output='root\\n-rwxr-xr-x root root\\n"), done.stdout
