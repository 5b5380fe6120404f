"""The seccomp filter of a program: what even an unprivileged process must not ask of the kernel.

A list of refusals, not of permissions: the wall is made of namespaces, this closes what they
leave open. Sockets are refused because programs of one worker share a network namespace;
namespaces and mounts because a program would be root in its own and could mount a tmpfs without
limit; memory that no limit counts (memfd, System V, io_uring) for the same reason.
"""

import ctypes
import errno
import platform
import struct

from . import kernel

_NEW_NAMESPACES = 0x7E020000
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06

# (clone, system calls that are refused)
_TABLES = {
    "x86_64": (
        56,
        # socket, shmget, semget, msgget, mq_open, memfd_create, memfd_secret
        (41, 29, 64, 68, 240, 319, 447)
        # ptrace, process_vm_readv/writev, kcmp, pidfd_getfd, process_madvise
        + (101, 310, 311, 312, 438, 440)
        # unshare, setns, mount, umount2, pivot_root, chroot
        + (272, 308, 165, 166, 155, 161)
        # open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, mount_setattr
        + (428, 429, 430, 431, 432, 433, 442)
        # bpf, perf_event_open, userfaultfd, io_uring_setup/enter/register
        + (321, 298, 323, 425, 426, 427)
        # add_key, request_key, keyctl, name_to_handle_at, open_by_handle_at, fanotify_init
        + (248, 249, 250, 303, 304, 300)
        # quotactl, swapon, swapoff, reboot, acct, syslog, kexec_load, init/delete/finit_module
        + (179, 167, 168, 169, 163, 103, 246, 175, 176, 313, 320)
        # iopl, ioperm, modify_ldt, sethostname, setdomainname, personality
        + (172, 173, 154, 170, 171, 135),
    ),
    "generic": (
        220,
        (198, 194, 190, 186, 180, 279, 447)
        + (117, 270, 271, 272, 438, 440)
        + (97, 268, 40, 39, 41, 51)
        + (428, 429, 430, 431, 432, 433, 442)
        + (280, 241, 282, 425, 426, 427)
        + (217, 218, 219, 264, 265, 262)
        + (60, 224, 225, 142, 89, 116, 104, 105, 106, 273, 294)
        + (161, 162, 92),
    ),
}
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "riscv64": 0xC00000F3}
_CLONE3 = 435


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class Filter:
    """A filter built once and put on many programs.

    Raises OSError on a processor whose system call numbers are not known here.
    """

    def __init__(self) -> None:
        machine = platform.machine()
        if machine not in _AUDIT:
            known = ", ".join(_AUDIT)
            raise OSError(f"no seccomp table for processor {machine!r}, known are {known}")
        clone, refused = _TABLES["x86_64" if machine == "x86_64" else "generic"]
        code = _assemble(_AUDIT[machine], clone, refused, machine == "x86_64")
        self._code = code
        self._program = _Program(len(code) // 8, code)
        self._pointer = ctypes.byref(self._program)

    def __call__(self) -> None:
        """From here on, for this process and all it starts."""
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        kernel.prctl(kernel.PR_SET_SECCOMP, 2, self._pointer)


def _assemble(audit: int, clone: int, refused: tuple[int, ...], has_x32: bool) -> bytes:
    def op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, k)

    # A sorted list with one comparison each; the tail holds the five ways out.
    lines = [op(_LOAD, 4), op(_JEQ, audit, 1, 0), op(_RETURN, _KILL), op(_LOAD, 0)]
    if has_x32:
        lines += [op(_JGE, 0x40000000, 0, 1), op(_RETURN, _KILL)]
    lines += [op(_JEQ, _CLONE3, 0, 1), op(_RETURN, _ERRNO | errno.ENOSYS)]
    lines += [
        op(_JEQ, clone, 0, 4),
        op(_LOAD, 16),
        op(_JSET, _NEW_NAMESPACES, 0, 1),
        op(_RETURN, _ERRNO | errno.EPERM),
        op(_RETURN, _ALLOW),
    ]
    for index, number in enumerate(refused):
        lines.append(op(_JEQ, number, len(refused) - index, 0))
    lines += [op(_RETURN, _ALLOW), op(_RETURN, _ERRNO | errno.EPERM)]
    return b"".join(lines)
