"""Which problems the reference solutions do not solve without a network, and why.

Measured by replaying the reference solution of every problem (`benchmarks/osbench.py`); all others
of the public 170 are solved.
"""

from collections.abc import Mapping
from types import MappingProxyType

_NETWORK = "installs a package from the network"
_PROCESSES = "counts processes, among them those of the check that counts again"
_TREE = "the folder set up is not where the example looks: it counts all of /, /proc included"
_MEMORY = "the share of memory in use, which changes with what else this computer does"

# Id: reason.
NOT_OFFLINE: Mapping[str, str] = MappingProxyType(
    {
        "6/new/5": _NETWORK,
        "6/new/6": _NETWORK,
        "6/new/8": _NETWORK,
        "7/bootstrap/0": _PROCESSES,
        "7/bootstrap/6": _MEMORY,
        "7/bootstrap/8": _TREE,
        "7/bootstrap/18": _MEMORY,
        "7/bootstrap/29": _TREE,
        "7/bootstrap/75": _PROCESSES,
        "dev/8": "the size is 4.0K, and the check takes whole numbers only",
    }
)

_USERS = "the set-up adds users"

# Where only root can be mapped (see `cycleqd_jax.sandbox.inside.identity`), these have to go too.
NEEDS_USERS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("4/N4/0", "6/new/0", "6/new/1", "6/new/2", "7/bootstrap/4"), _USERS),
        **dict.fromkeys(("dev/18", "dev/19", "dev/20", "dev/24"), _USERS),
    }
)


def not_offline(users: bool) -> Mapping[str, str]:
    """Id and reason of every problem to leave out; ``users``: whether there are any beside root."""
    return NOT_OFFLINE if users else {**NOT_OFFLINE, **NEEDS_USERS}
