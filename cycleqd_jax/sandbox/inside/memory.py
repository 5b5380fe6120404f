"""How many processes a program has and how much memory they hold together."""

import os

_PAGE = os.sysconf("SC_PAGE_SIZE")
# Fields of a stat file, counted from the state.
_PARENT, _THREADS, _SIZE, _RSS = 1, 17, 20, 21


def usage(proc: int, first: int, limit: int) -> tuple[int, int]:
    """Processes and bytes of the tree below process `first`, itself included.

    proc: descriptor of a /proc in which the tree can be seen. first: 0 for all processes that can
    be seen there. Orphans move up to `first`, the
    first process of their namespace, so nothing leaves the tree. Shared pages are counted for
    each process, unless that takes the sum above `limit`: then each gets its share.
    """
    parents: dict[int, int] = {}
    places: dict[int, str] = {}
    pages: dict[int, int] = {}
    for name in os.listdir(proc):
        if name.isdigit():
            place, stat = name, _stat(proc, name)
            if stat and _has_left(stat):
                place, stat = _other_thread(proc, name) or (name, stat)
            if stat:
                pid = int(name)
                places[pid], parents[pid], pages[pid] = place, int(stat[_PARENT]), int(stat[_RSS])
    tree = [pid for pid in pages if _is_below(pid, first, parents)]
    total = sum(pages[pid] for pid in tree) * _PAGE
    if total > limit:
        total = sum(_share(proc, places[pid], pages[pid] * _PAGE) for pid in tree)
    return len(tree), total


def sockets(proc: int) -> int:
    """Sockets in this process's network namespace, those on their way through others included."""
    words = _read(proc, "self/net/sockstat").split()
    return int(words[2]) if len(words) > 2 else 0


def is_ending(proc: int, pid: int) -> bool:
    """Whether a process has given up its memory, on its way out, and no thread of it runs on."""
    stat = _stat(proc, str(pid))
    return not stat or (stat[_SIZE] == b"0" and not _has_left(stat))


def own_size(proc: int) -> int:
    """Bytes of address space of this process."""
    return int(_read(proc, "self/statm").split()[0]) * _PAGE


def _stat(proc: int, place: str) -> list[bytes]:
    # From the state on; the name before it may hold anything. Empty for what has ended.
    fields = _read(proc, f"{place}/stat").rpartition(b")")[2].split()
    return fields if len(fields) > _RSS else []


def _has_left(stat: list[bytes]) -> bool:
    # The first thread ended before the others; what /proc says of the process is what it said
    # of that thread, and a thread that has ended has no memory.
    return stat[_SIZE] == b"0" and int(stat[_THREADS]) > 1


def _other_thread(proc: int, name: str) -> tuple[str, list[bytes]] | None:
    try:
        folder = os.open(f"{name}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=proc)
    except OSError:
        return None
    try:
        threads = os.listdir(folder)
    except OSError:
        return None
    finally:
        os.close(folder)
    for thread in threads:
        place = f"{name}/task/{thread}"
        stat = _stat(proc, place)
        if stat and stat[_SIZE] != b"0":
            return place, stat
    return None


def _is_below(pid: int, first: int, parents: dict[int, int]) -> bool:
    while pid != first:
        pid = parents.get(pid, 0)
        if pid == 0:
            return first == 0
    return True


def _share(proc: int, place: str, resident: int) -> int:
    for line in _read(proc, f"{place}/smaps_rollup").splitlines():
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
