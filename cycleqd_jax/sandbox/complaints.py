"""What a process of the sandbox writes to its standard error, kept for the errors that name it."""

import os
import tempfile

_CHARACTERS = 1000
_BYTES = 4 * _CHARACTERS


class Complaints:
    """A file without a name, whose descriptor is given to a process as standard error.

    The processes that write there share its offset with this one, so it is read without moving it.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as this)

    def fileno(self) -> int:
        """The descriptor."""
        return self._file.fileno()

    def last(self) -> str:
        """The end of what was written, 1000 characters at most; "" once it is closed."""
        if self._file.closed:
            return ""
        size = os.fstat(self.fileno()).st_size
        end = os.pread(self.fileno(), _BYTES, max(0, size - _BYTES))
        return end.decode("utf-8", "replace").strip()[-_CHARACTERS:]

    def clear(self) -> None:
        """Forget all of it, before the next process begins to write."""
        # Left where it was, the offset would leave a hole of zeros before the next complaint.
        self._file.seek(0)
        self._file.truncate()

    def close(self) -> None:
        """Give the file up."""
        self._file.close()
