"""What an operating system has to do for an episode."""

from typing import Protocol, runtime_checkable

from cycleqd_jax.sandbox.machines import Ended, Turn


@runtime_checkable
class System(Protocol):
    """One episode's own system; `cycleqd_jax.sandbox.machines.Machine` is one."""

    def type(self, command: str, seconds: float) -> Turn:
        """Type a command in the agent's shell.

        Raises:
            MachineLost: the system has ended, or was ended at a limit.
        """

    def run(self, command: list[str], seconds: float) -> Ended:
        """Run a program beside that shell: as root, in /, with its standard output returned.

        Raises:
            MachineLost: as above.
            ValueError: arguments that no program can be given.
        """

    def close(self) -> None:
        """Leave nothing behind; safe to repeat, and from another thread."""


@runtime_checkable
class Backend(Protocol):
    """A kind of system; `cycleqd_jax.sandbox.machines.Machines` is one.

    Attributes:
        users: whether a system has users beside root.
    """

    users: bool

    def boot(self) -> System:
        """Start a system.

        Raises:
            SandboxBroken: none starts any more, which is no problem's fault.
        """
