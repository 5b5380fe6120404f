"""What a program meets and what is reported of it, on every backend."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cycleqd_jax.sandbox import Job, Limits, SandboxUnavailable, open_sandbox, pool


def run_one(sandbox, kind, source, **fields):
    return sandbox.run([Job(kind, source, **fields)])[0]


def test_python_program_runs_as_main(roomy):
    source = "import sys\nprint(__name__, sys.argv, input(), sys.stdin.read())\n"
    source += "sys.stderr.write('e')"
    outcome = run_one(roomy, "python", source, stdin="one\ntwo\nthree")
    assert outcome.status == "ok"
    assert outcome.returncode == 0
    assert outcome.stdout == "__main__ ['program.py'] one two\nthree\n"
    assert outcome.stderr == "e"
    assert outcome.files is None


@pytest.mark.parametrize(
    ("source", "code", "stderr"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit", 0, ""),
        ("exit('no')", 1, "no\n"),
        ("import os; os._exit(7)", 7, ""),
    ],
)
def test_python_exit_codes(roomy, source, code, stderr):
    outcome = run_one(roomy, "python", source)
    assert (outcome.returncode, outcome.stderr) == (code, stderr)
    assert outcome.status == ("ok" if code == 0 else "error")


def test_python_exception_shows_its_line_and_no_frame_of_ours(roomy):
    outcome = run_one(roomy, "python", "def f():\n    return 1 / 0\nf()\n")
    assert (outcome.status, outcome.returncode) == ("error", 1)
    assert "return 1 / 0" in outcome.stderr
    assert outcome.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert outcome.stderr.count('File "') == 2


def test_python_syntax_error(roomy):
    outcome = run_one(roomy, "python", "def f(:\n")
    assert outcome.returncode == 1
    assert "SyntaxError" in outcome.stderr


def test_python_threads_and_exit_functions_finish(roomy):
    source = (
        "import atexit, threading, time\natexit.register(print, 'bye')\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), print('thread'))).start()\n"
    )
    assert run_one(roomy, "python", source).stdout == "thread\nbye\n"


def test_python_writes_out_what_was_left_open(roomy):
    source = "f = open('a', 'w')\nf.write('text')\ndef g(): return f\nprint('x', end='')"
    outcome = run_one(roomy, "python", source, snapshot=True)
    assert (outcome.files, outcome.stdout) == ({"a": "text"}, "x")


def test_python_replaced_output_does_not_swallow_what_came_before(roomy):
    source = "import io, sys\nprint('first')\nsys.stdout = io.StringIO()\nprint('lost')"
    assert run_one(roomy, "python", source).stdout == "first\n"


def test_python_imports_a_file_of_the_job_and_the_standard_library(roomy):
    source = "import helper, json, sqlite3, asyncio, subprocess, sys\nprint(helper.VALUE)\n"
    source += "print(subprocess.run([sys.executable, '-c', 'print(5)'], capture_output=True))"
    outcome = run_one(roomy, "python", source, files={"helper.py": "VALUE = 4\n"}, snapshot=True)
    assert outcome.stdout.startswith("4\n")
    assert "stdout=b'5\\n'" in outcome.stdout
    assert outcome.files == {"helper.py": "VALUE = 4\n"}


def test_bash_program(roomy):
    source = "echo $HOME; pwd; diff <(echo a) <(echo b); echo 'x' >&2; mktemp -u; cat; exit 4"
    outcome = run_one(roomy, "bash", source, stdin="in")
    assert (outcome.status, outcome.returncode, outcome.stderr) == ("error", 4, "x\n")
    lines = outcome.stdout.splitlines()
    assert lines[:6] == ["/home/user", "/home/user", "1c1", "< a", "---", "> b"]
    assert lines[6].startswith("/tmp/")
    assert lines[7] == "in"


def test_bash_pipeline_dies_of_sigpipe(roomy):
    assert run_one(roomy, "bash", "yes | head -n 1; echo ${PIPESTATUS[0]}").stdout == "y\n141\n"


def test_long_bash_script(roomy):
    source = "\n".join(["true " + "x" * 90] * 2000 + ["echo end"])
    outcome = run_one(roomy, "bash", source, snapshot=True)
    assert (outcome.stdout, outcome.files) == ("end\n", {})


def test_large_files_and_stdin_arrive_whole(roomy):
    text = "0123456789abcdef" * 65536
    source = "import sys\nprint(len(open('a/b.txt').read()), len(sys.stdin.read()))"
    outcome = run_one(roomy, "python", source, files={"a/b.txt": text}, stdin=text)
    assert outcome.stdout == f"{len(text)} {len(text)}\n"


def test_snapshot_encodes_directories_and_leaves_out_the_rest(roomy):
    source = "mkdir -p new/deep; echo hi > new/deep/f; rm a; ln -s /etc/passwd link; mkfifo pipe"
    source += r"; printf '\xff' > raw; chmod 000 raw new/deep"
    outcome = run_one(roomy, "bash", source, files={"a": "1", "b": "2", "c/": ""}, snapshot=True)
    assert outcome.files == {
        "b": "2", "c/": "", "new/": "", "new/deep/": "", "new/deep/f": "hi\n", "raw": "\ufffd",
    }  # fmt: skip


def test_environment_is_small_and_fixed(roomy):
    source = "env -0 | sort -z | tr '\\0' '\\n'; umask; hostname; id -u; ulimit -c"
    first, second = roomy.run([Job("bash", source)] * 2)
    assert first == second
    names = {line.partition("=")[0] for line in first.stdout.splitlines() if "=" in line}
    assert names <= {
        "HOME", "PWD", "USER", "LOGNAME", "SHELL", "TERM", "TMPDIR", "PATH", "LC_ALL", "TZ", "_",
        "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "LD_LIBRARY_PATH", "SHLVL", "OLDPWD",
    }  # fmt: skip
    assert first.stdout.endswith("0022\nsandbox\n1000\n0\n")


def test_python_is_deterministic(roomy):
    source = "import random, time\nprint(random.random(), hash('a'), set('abcdef'), time.tzname)"
    outcomes = roomy.run([Job("python", source)] * 6)
    assert len({outcome.stdout for outcome in outcomes}) == 1


def test_outcomes_come_in_the_order_of_the_jobs(roomy):
    jobs = [
        Job("python", f"import time; time.sleep({0.1 if n % 7 == 0 else 0}); print({n})")
        for n in range(40)
    ]
    assert [outcome.stdout for outcome in roomy.run(jobs)] == [f"{n}\n" for n in range(40)]
    assert roomy.run([]) == []


def test_submitted_jobs_end_each_on_its_own(roomy):
    slow, *fast = roomy.submit(
        [Job("python", "import time; time.sleep(0.8)"), *[Job("python", "print(1)")] * 6]
    )
    # One of them may wait in the pipe behind the slow one.
    assert sum(future.result().stdout == "1\n" for future in fast[1:]) >= 4
    assert 0.7 < slow.result().seconds < 10


def test_an_unfit_job_fails_alone(roomy):
    big = Job("bash", "", files={"big": "x" * (9 << 20)})
    good, bad = roomy.submit([Job("bash", "echo 1"), big])
    assert good.result().stdout == "1\n"
    with pytest.raises(ValueError, match=r"Limits\.file_mb allows 8"):
        bad.result()


def test_what_is_cancelled_before_its_turn_is_not_run(backend):
    with open_sandbox(backend, workers=1) as sandbox:
        futures = sandbox.submit([Job("python", "import time; time.sleep(0.3)")] * 6)
        assert futures[-1].cancel()
        assert sandbox.run([Job("bash", "echo 1")])[0].stdout == "1\n"
        assert all(future.done() for future in futures)


def test_closing_fails_what_waits(backend):
    sandbox = open_sandbox(backend, workers=1)
    futures = sandbox.submit([Job("bash", "sleep 1")] * 4)
    sandbox.close()
    for future in futures:
        with pytest.raises(ValueError, match="closed while programs were waiting"):
            future.result(timeout=5)


def test_threads_take_turns(roomy):
    results = {}

    def work(n):
        results[n] = roomy.run([Job("python", f"print({n})")] * 3)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: {o.stdout for o in outcomes} for n, outcomes in results.items()} == {
        n: {f"{n}\n"} for n in range(4)
    }


def test_a_killed_server_is_started_again(backend):
    with open_sandbox(backend, workers=1) as sandbox:
        before = sandbox._workers[0].session
        os.killpg(before, signal.SIGKILL)
        assert run_one(sandbox, "python", "print(1)").stdout == "1\n"
        assert sandbox._workers[0].session != before


def test_a_hung_server_is_started_again(backend, monkeypatch):
    monkeypatch.setattr(pool, "_PATIENCE_SECONDS", 0.2)
    with open_sandbox(backend, Limits(seconds=1.0), workers=1) as sandbox:
        os.killpg(sandbox._workers[0].session, signal.SIGSTOP)
        assert run_one(sandbox, "python", "print(1)").stdout == "1\n"


def test_a_program_that_takes_the_server_with_it_is_killed_not_retried_for_ever(
    backend, monkeypatch
):
    with open_sandbox(backend, workers=1) as sandbox:
        worker = sandbox._workers[0]
        send = worker.send
        bad = b"take the server with you"

        def send_and_die(data):
            send(data)
            if bad in data:
                worker.kill()

        monkeypatch.setattr(worker, "send", send_and_die)
        outcomes = sandbox.run([Job("bash", "echo 1"), Job("bash", f": {bad.decode()}; sleep 5")])
        assert outcomes[0].stdout == "1\n"
        assert outcomes[1].status == "killed"
        assert "server died" in outcomes[1].reason


def test_the_server_ends_with_its_parent(backend):
    source = (
        "import os, signal, sys\nfrom cycleqd_jax.sandbox import Job, open_sandbox\n"
        f"box = open_sandbox({backend!r}, workers=1)\n"
        "print(box._workers[0].session, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, check=False)
    session = int(done.stdout)
    for _ in range(100):
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the server outlived its parent by ten seconds")


def test_a_closed_sandbox_says_so(backend):
    sandbox = open_sandbox(backend, workers=1)
    sandbox.close()
    sandbox.close()
    with pytest.raises(ValueError, match="closed"):
        run_one(sandbox, "python", "")


def test_no_backend_is_a_refusal_that_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match=r"bubblewrap: not installed.*apt install"):
        open_sandbox()


def test_a_backend_that_fails_is_a_refusal_with_its_words(monkeypatch, tmp_path):
    for name in ("bwrap", "unshare"):
        script = tmp_path / name
        script.write_text("#!/bin/sh\necho no namespaces for you >&2\nexit 1\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match=r"bubblewrap: no namespaces.*unshare: no names"):
        open_sandbox()


def test_auto_takes_the_second_when_the_first_fails(monkeypatch, tmp_path):
    script = tmp_path / "bwrap"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with open_sandbox(workers=1) as sandbox:
        assert sandbox.backend == "unshare"


def test_bad_arguments(roomy):
    with pytest.raises(ValueError, match="expected one of auto, bubblewrap, unshare"):
        open_sandbox("docker")
    with pytest.raises(ValueError, match="workers: expected at least 1"):
        open_sandbox(workers=0)
    with pytest.raises(ValueError, match=r"9\.0 MiB in all, Limits\.file_mb allows 8"):
        run_one(roomy, "bash", "", files={"big": "x" * (9 << 20)})
    with pytest.raises(ValueError, match=r"Job\.files: expected a length of at most 2000"):
        run_one(roomy, "bash", "", files={str(n): "" for n in range(2001)})
