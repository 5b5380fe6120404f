"""The command that starts a worker inside the outer wall, for each backend."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .layout import Layout

_INSIDE = "/server/inside"


def bubblewrap_command(layout: Layout) -> list[str] | None:
    """The bwrap call, None when bubblewrap is not installed."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return None
    command = [bwrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    # The true root keeps its rights for the inner set-up and gives them up there.
    command += ["--cap-add", "ALL"] if _may_mount() else ["--unshare-user"]
    for source, place in layout.binds:
        command += ["--dev-bind" if place.startswith("/dev/") else "--ro-bind", source, place]
    for target, path in layout.links:
        if path.count("/") == 1 and path != "/tmp":
            command += ["--symlink", target, path]
    command += ["--ro-bind", str(Path(__file__).parent / "inside"), _INSIDE]
    # As process 1 it is waited for, and with it goes everything else.
    command += ["--as-pid-1", "--proc", "/proc", "--dir", "/tmp", "--chdir", "/"]
    return [*command, *_server(layout, os.path.dirname(_INSIDE))]


def unshare_command(layout: Layout) -> list[str] | None:
    """The util-linux call, None when unshare is not installed."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return None
    command = [unshare, "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
    if not _may_mount():
        command += ["--user", "--map-root-user"]
    return [*command, *_server(layout, str(Path(__file__).parent))]


def inner_layout(backend: str, layout: Layout) -> dict[str, object]:
    """The layout as the worker meets it: bubblewrap has already moved everything in place."""
    plain = layout.as_json()
    if backend == "bubblewrap":
        plain["binds"] = [(place, place) for _, place in layout.binds]
    return plain


COMMANDS: dict[str, Callable[[Layout], list[str] | None]] = {
    "bubblewrap": bubblewrap_command,
    "unshare": unshare_command,
}


def _server(layout: Layout, folder: str) -> list[str]:
    code = f"import sys; sys.path.append({folder!r}); from inside.server import main; main()"
    return [layout.python, "-s", "-S", "-P", "-X", "utf8", "-c", code]


def _may_mount() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return os.geteuid() == 0 and bool(int(line.split()[1], 16) & (1 << 21))
    return False
