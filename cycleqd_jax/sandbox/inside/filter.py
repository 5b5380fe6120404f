"""The seccomp filter of a program: what even an unprivileged process must not ask of the kernel.

A list of refusals, not of permissions: the wall is made of namespaces, this closes what they
leave open. Sockets are refused because programs of one worker share a network namespace; a pair
of them is allowed, without an address and with the buffers it is born with. Memory that no limit
counts would let a program outgrow its share: memfd, System V, io_uring, pages lent to a pipe, huge
pages, and shared memory without a file, which lives on while no process has a page of it mapped.
The rest are corners of the kernel that no small program needs and that have had holes.
"""

import ctypes
import errno
import platform
import struct
from collections.abc import Sequence

from . import kernel

_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_NUMBER, _PROCESSOR, _FIRST_ARGUMENT = 0, 4, 16  # offsets; arguments have eight bytes each
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "riscv64": 0xC00000F3}

# Name: (number on x86-64, number on every other processor)
_REFUSED = {
    "socket": (41, 198),
    "bind": (49, 200),
    "connect": (42, 203),
    "setsockopt": (54, 208),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "vmsplice": (278, 75),
    "splice": (275, 76),
    "tee": (276, 77),
    "sendfile": (40, 71),
    "io_setup": (206, 0),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "unshare": (272, 97),
    "setns": (308, 268),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "acct": (163, 89),
    "syslog": (103, 116),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "personality": (135, 92),
}
_REFUSED_ON_X86 = {"iopl": 172, "ioperm": 173, "modify_ldt": 154}
# Permitted where sockets of some families are.
_FOR_ADDRESSES = ("socket", "bind", "connect", "setsockopt")
# Refused for some arguments.
_MMAP, _SOCKETPAIR = (9, 222), (53, 199)
_MAP_SHARED, _MAP_ANONYMOUS, _MAP_HUGETLB, _AF_UNIX = 0x1, 0x20, 0x40000, 1


def install(families: Sequence[int] = ()) -> None:
    """From here on, for this process and all it starts; nothing takes it off again.

    families: of sockets that may be made; they need a network namespace of their own.

    Raises OSError on a processor whose system call numbers are not known here.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURE:
        known = ", ".join(_ARCHITECTURE)
        raise OSError(f"no seccomp table for processor {machine!r}; there is one for {known}")
    code = _assemble(machine, families)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(kernel.PR_SET_SECCOMP, 2, ctypes.byref(_Program(len(code) // 8, code)))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _assemble(machine: str, families: Sequence[int]) -> bytes:
    x86 = machine == "x86_64"
    column = 0 if x86 else 1
    numbers = [
        pair[column] for name, pair in _REFUSED.items() if not (families and name in _FOR_ADDRESSES)
    ]
    lines = [
        _line(_LOAD, _PROCESSOR),
        _line(_EQUAL, _ARCHITECTURE[machine], 1, 0),
        _line(_RETURN, _KILL),
        _line(_LOAD, _NUMBER),
    ]
    if x86:
        # The x32 calls are the same ones under other numbers.
        lines += [_line(_AT_LEAST, 0x40000000, 0, 1), _line(_RETURN, _KILL)]
        numbers += _REFUSED_ON_X86.values()
    if families:
        # Of a permitted family, the rest of the list is passed over as well as the refusal.
        lines.append(_line(_EQUAL, _REFUSED["socket"][column], 0, len(families) + 3))
        lines.append(_line(_LOAD, _FIRST_ARGUMENT))
        for index, family in enumerate(families):
            lines.append(_line(_EQUAL, family, len(families) - index, 0))
        lines += [_line(_RETURN, _ERRNO | errno.EAFNOSUPPORT), _line(_RETURN, _ALLOW)]
    nameless = _MAP_SHARED | _MAP_ANONYMOUS
    # A jump counts the lines it leaves out; the last two lines are the verdicts.
    by_arguments = [
        _line(_EQUAL, _MMAP[column], 0, 4),
        _line(_LOAD, _FIRST_ARGUMENT + 3 * 8),
        _line(_ANY_BIT, _MAP_HUGETLB, 6, 0),
        _line(_AND, nameless),
        _line(_EQUAL, nameless, 4, 3),
        _line(_EQUAL, _SOCKETPAIR[column], 0, 2),
        _line(_LOAD, _FIRST_ARGUMENT),
        _line(_EQUAL, _AF_UNIX, 0, 1),
    ]
    for index, number in enumerate(numbers):
        lines.append(_line(_EQUAL, number, len(numbers) - index + len(by_arguments), 0))
    lines += [*by_arguments, _line(_RETURN, _ALLOW), _line(_RETURN, _ERRNO | errno.EPERM)]
    return b"".join(lines)


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
