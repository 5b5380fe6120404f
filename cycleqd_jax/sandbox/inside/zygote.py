"""The process that is cloned for every program; it never holds anything of any job.

A clone shares all memory until it writes to it, and nearly all its cost is the pages that it
does write to. So whatever can be made before the clone is made here.
"""

import array
import gc
import os
import platform
import random
import resource
import socket
from typing import Any, NoReturn

from . import filter as seccomp
from . import kernel, memory, program, wire

INNER_UID = 1000
SNAPSHOT, PLAIN = b"s", b"p"
READY, FOLDER = b"+", b"/"
_NAMESPACES = kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID
_MAX_FDS = 256
_STDIN = "/home/tmp/stdin"


class Zygote:
    """Everything a clone needs, ready for use."""

    def __init__(self, requests: socket.socket, proc: int, limits: dict[str, Any]) -> None:
        flags = kernel.MS_NOSUID | kernel.MS_NODEV
        owner = f"mode=755,uid={INNER_UID},gid={INNER_UID}"
        options = f"size={limits['file_bytes']},nr_inodes=4096,{owner}"
        self._requests = requests
        self._map_user = kernel.MapUser(proc, INNER_UID)
        self._mount_home = kernel.Mount("tmpfs", "/home", flags, options)
        flags |= kernel.MS_NOEXEC
        self._mount_proc = kernel.Mount("proc", "/proc", flags)
        flags |= kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY
        self._close_proc = kernel.Mount("proc", "/proc", flags)
        self._drop_capabilities = kernel.Drop()
        seconds = int(-(-limits["seconds"] // 1))
        # A hard limit one second later: the soft one is a signal that a program may ignore.
        self._own_limits = (
            (resource.RLIMIT_CPU, (seconds, seconds + 1)),
            (resource.RLIMIT_NPROC, (_process_limit(limits["processes"]),) * 2),
        )
        for name, value in (
            (resource.RLIMIT_AS, memory.own_size(proc) + limits["memory_bytes"]),
            (resource.RLIMIT_FSIZE, limits["file_bytes"]),
            (resource.RLIMIT_NOFILE, _MAX_FDS),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
        ):
            resource.setrlimit(name, (value, value))

    def serve(self) -> NoReturn:
        """Answer every request (descriptors: job, control, stdout, stderr) with a process id.

        The new process is a sibling (CLONE_PARENT): the supervisor waits for it. A negative
        answer is an errno.
        """
        program.prepare()
        seccomp.install()
        os.umask(0o022)
        random.seed(0)
        gc.collect()
        gc.disable()
        gc.freeze()
        while True:
            message, fds, _, _ = socket.recv_fds(self._requests, 1, 4)
            if not message:
                os._exit(0)
            try:
                pid = kernel.clone(_NAMESPACES | kernel.CLONE_PARENT)
            except OSError as error:
                pid = -(error.errno or 1)
            if pid == 0:
                self._become_program(fds, message == SNAPSHOT)
            for fd in fds:
                os.close(fd)
            self._requests.send(pid.to_bytes(4, "little", signed=True))

    def _become_program(self, fds: list[int], snapshot: bool) -> NoReturn:
        job, control, out, err = fds
        try:
            body = os.read(job, os.fstat(job).st_size)
            python, source, stdin, files = wire.unpack_body(body)
            self._map_user()
            self._mount_home()
            self._mount_proc()
            _forbid_user_namespaces()
            # Some of its files are settings of the worker: they would outlive the program.
            self._close_proc()
            os.mkdir("/home/user")
            os.mkdir("/home/tmp")
            os.chdir("/home/user")
            if files:
                _write_files(files)
            _standard_input(stdin)
            if snapshot:
                _send_folder(control)
            os.dup2(out, 1)
            os.dup2(err, 2)
            # A signal to its own group must not reach the supervisor's.
            os.setpgid(0, 0)
            for name, value in self._own_limits:
                resource.setrlimit(name, value)
            self._drop_capabilities()
            # Whoever sees this knows that the wall is complete.
            os.write(control, READY)
        except BaseException as error:
            os.write(control, f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:500])
            os._exit(125)
        os.closerange(3, _MAX_FDS)
        program.start(python, source)


def _process_limit(processes: int) -> int:
    # Before Linux 5.14 the kernel counts all processes of the user on the machine, not those of
    # the namespace; there the supervisor's own count is the limit and this only a second line.
    major, minor = (int(part) for part in platform.release().split(".")[:2])
    return processes if (major, minor) >= (5, 14) else processes + 4096


def _forbid_user_namespaces() -> None:
    # A program would be root in its own: it could mount a tmpfs without limit.
    fd = os.open("/proc/sys/user/max_user_namespaces", os.O_WRONLY)
    os.write(fd, b"0")
    os.close(fd)


def _write_files(files: list[tuple[bytes, bytes]]) -> None:
    for path, content in files:
        folder = path.rpartition(b"/")[0]
        if folder:
            os.makedirs(folder, exist_ok=True)
        if not path.endswith(b"/"):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            wire.write_all(fd, content)
            os.close(fd)


def _standard_input(text: bytes) -> None:
    # Never the zygote's: flags and locks of an open file are shared by all who inherit it.
    if text:
        fd = os.open(_STDIN, os.O_RDWR | os.O_CREAT, 0o600)
        os.unlink(_STDIN)
        wire.write_all(fd, text)
        os.lseek(fd, 0, os.SEEK_SET)
    else:
        fd = os.open("/dev/null", os.O_RDONLY)
    os.dup2(fd, 0)
    os.close(fd)


def _send_folder(control: int) -> None:
    # The directory outlives its mount namespace through this descriptor.
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    with socket.socket(fileno=os.dup(control)) as channel:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [folder]))
        channel.sendmsg([FOLDER], [rights])
