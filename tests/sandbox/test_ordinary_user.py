"""The true root runs the other tests in CI; users are seldom root."""

import os
import subprocess
import sys

import pytest

NOBODY = 65534
SOURCE = """
import sys
sys.path.insert(0, {folder!r})
from cycleqd_jax.sandbox import Job, Limits, open_sandbox
with open_sandbox({backend!r}, Limits(seconds=20.0), workers=1) as box:
    for outcome in box.run([
        Job("python", "import os; print(os.getuid())"),
        Job("bash", "echo x > f; chmod 0 f; cat /etc/shadow", snapshot=True),
        Job("python", "import os\\nwhile True: os.fork()"),
        Job("bash", "echo 1 1 1 1 > /proc/sys/kernel/sem"),
    ]):
        print(outcome.status, outcome.stdout.strip(), outcome.files)
"""


def public_python():
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        try:
            done = subprocess.run([python, "-c", check], user=NOBODY, group=NOBODY, check=False)
        except OSError:
            continue
        if done.returncode == 0:
            return python
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="every test of this room runs as an ordinary user")
def test_an_ordinary_user_gets_the_same(backend, public_copy):
    python = public_python()
    if python is None:
        pytest.skip("no Python 3.11 that an ordinary user may run")
    done = subprocess.run(
        [python, "-I", "-B", "-c", SOURCE.format(folder=public_copy, backend=backend)],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "ok 1000 None",
        "error  {'f': 'x\\n'}",
        "error  None",
        "error  None",
    ]
