"""A private MariaDB server for tests and benchmarks: on loopback, in a folder of its own.

    python -m cycleqd_jax.tasks.dbbench.server

starts one, prints its address and stops it on Ctrl-C.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_START_SECONDS = 60.0
# Durability is of no use here. The limits bound what a hostile statement can fill: all tables
# together, one temporary table, one session's memory.
_OPTIONS = (
    "--bind-address=127.0.0.1",
    "--skip-name-resolve",
    "--skip-log-bin",
    "--local-infile=0",
    "--character-set-server=utf8mb4",
    "--performance-schema=OFF",
    "--innodb-buffer-pool-size=32M",
    "--innodb-log-file-size=16M",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-doublewrite=0",
    "--innodb-file-per-table=0",
    "--innodb-data-file-path=ibdata1:12M:autoextend:max:512M",
    "--enforce-storage-engine=InnoDB",
    "--tmp-disk-table-size=64M",
    "--max-heap-table-size=16M",
    "--max-session-mem-used=64M",
    "--max-allowed-packet=16M",
    "--sync-frm=0",
)


def missing_programs() -> list[str]:
    """What has to be installed first; empty if `private_server` can start."""
    return [name for name in ("mariadb-install-db", "mariadbd") if _find(name) is None]


@contextlib.contextmanager
def private_server() -> Iterator[str]:
    """Start a server and give the URL of its administrator; it is stopped and removed afterwards.

    Raises:
        RuntimeError: MariaDB is not installed, or does not come up; the message has its log's end.
    """
    if missing := missing_programs():
        raise RuntimeError(
            f"{', '.join(missing)} not found: apt install mariadb-server, or use a running server"
        )
    folder = Path(tempfile.mkdtemp(prefix="dbbench-mariadb-"))
    try:
        account = "mysql" if os.geteuid() == 0 else None
        if account:
            shutil.chown(folder, account, account)
        data, files = folder / "data", folder / "files"
        command = [_find("mariadb-install-db"), "--no-defaults", f"--datadir={data}"]
        command += ["--auth-root-authentication-method=normal", "--skip-test-db"]
        command += [f"--user={account}"] if account else []
        installed = subprocess.run([str(c) for c in command], capture_output=True, check=False)
        if installed.returncode:
            raise RuntimeError(f"mariadb-install-db failed: {installed.stderr.decode()[-1000:]}")
        files.mkdir()
        yield from _serve(folder, data, files, account)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve(folder: Path, data: Path, files: Path, account: str | None) -> Iterator[str]:
    password = secrets.token_hex(12)
    first = folder / "first.sql"
    first.write_text(
        f"ALTER USER root@localhost IDENTIFIED BY '{password}';\n"
        f"CREATE USER admin@'127.0.0.1' IDENTIFIED BY '{password}';\n"
        "GRANT ALL ON *.* TO admin@'127.0.0.1' WITH GRANT OPTION;\n"
    )
    first.chmod(0o644)
    port = _free_port()
    command = [_find("mariadbd"), "--no-defaults", f"--datadir={data}", f"--port={port}"]
    command += [f"--socket={folder / 'socket'}", f"--pid-file={folder / 'pid'}", *_OPTIONS]
    command += [f"--init-file={first}", f"--secure-file-priv={files}", f"--tmpdir={data}"]
    command += [f"--user={account}"] if account else []
    log = folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [str(c) for c in command], stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        _wait(process, port, log)
        yield f"mysql://admin:{password}@127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        # The log says so after the first accounts exist.
        if b"ready for connections" in log.read_bytes():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
        time.sleep(0.05)
    end = log.read_text(errors="replace")[-1000:]
    raise RuntimeError(f"mariadbd did not start in {_START_SECONDS:.0f} s:\n{end}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _find(program: str) -> str | None:
    # Servers live in folders that are not on every user's path.
    folders = [*os.get_exec_path(), "/usr/sbin", "/usr/local/sbin", "/usr/libexec"]
    return shutil.which(program, path=os.pathsep.join(folders))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    with private_server() as url, contextlib.suppress(KeyboardInterrupt):
        print(url, flush=True)
        signal.pause()
