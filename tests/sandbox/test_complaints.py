"""Standard error of the sandbox's processes, read while they write."""

import subprocess

from cycleqd_jax.sandbox.complaints import Complaints


def write(complaints: Complaints, text: str) -> "subprocess.Popen[bytes]":
    command = ["bash", "-c", f"read; printf '%s' '{text}' >&2"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=complaints.fileno())


def test_the_end_is_read_and_nothing_is_written_over() -> None:
    complaints = Complaints()
    assert complaints.last() == ""
    for text in ("first ", "é" * 600, "x" * 600):
        with write(complaints, text) as process:
            complaints.last()
            process.communicate(b"\n")
    assert complaints.last() == "é" * 400 + "x" * 600
    complaints.close()
    assert complaints.last() == ""


def test_the_next_process_begins_anew() -> None:
    complaints = Complaints()
    for text in ("a long complaint", "short"):
        complaints.clear()
        with write(complaints, text) as process:
            process.communicate(b"\n")
        assert complaints.last() == text
    complaints.close()
