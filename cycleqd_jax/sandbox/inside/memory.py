"""How many processes a program has and how much memory they hold together."""

import os

_PAGE = os.sysconf("SC_PAGE_SIZE")


def usage(proc: int, first: int, limit: int) -> tuple[int, int]:
    """Processes and bytes of the tree below process `first`, itself included.

    proc: descriptor of a /proc in which the tree can be seen. first: 0 for all processes that can
    be seen there. Orphans move up to `first`, the
    first process of their namespace, so nothing leaves the tree. Shared pages are counted for
    each process, unless that takes the sum above `limit`: then each gets its share.
    """
    parents: dict[int, int] = {}
    pages: dict[int, int] = {}
    for name in os.listdir(proc):
        if name.isdigit():
            stat = _read(proc, f"{name}/stat")
            fields = stat.rpartition(b")")[2].split()
            if len(fields) > 21:
                parents[int(name)], pages[int(name)] = int(fields[1]), int(fields[21])
    tree = [pid for pid in pages if _is_below(pid, first, parents)]
    total = sum(pages[pid] for pid in tree) * _PAGE
    if total > limit:
        total = sum(_share(proc, pid, pages[pid] * _PAGE) for pid in tree)
    return len(tree), total


def own_size(proc: int) -> int:
    """Bytes of address space of this process."""
    return int(_read(proc, "self/statm").split()[0]) * _PAGE


def _is_below(pid: int, first: int, parents: dict[int, int]) -> bool:
    while pid != first:
        pid = parents.get(pid, 0)
        if pid == 0:
            return first == 0
    return True


def _share(proc: int, pid: int, resident: int) -> int:
    for line in _read(proc, f"{pid}/smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return resident


def _read(proc: int, path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY, dir_fd=proc)
        try:
            return os.read(fd, 4096)
        finally:
            os.close(fd)
    except OSError:
        return b""  # it ended in the meantime
