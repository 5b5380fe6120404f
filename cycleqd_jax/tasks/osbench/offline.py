"""Which problems have no right answer without a network or another user, and why."""

from collections.abc import Mapping
from types import MappingProxyType

NOT_OFFLINE: Mapping[str, str] = MappingProxyType({})

# Where only root can be mapped (see `cycleqd_jax.sandbox.inside.identity`), these fail as well.
NEEDS_USERS: Mapping[str, str] = MappingProxyType({})
