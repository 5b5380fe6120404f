"""Where the output of a command ends on a terminal that a model types on.

After the command a line is typed that prints two random words as one. Neither word is known before
the command runs and the joined word is typed nowhere, so that neither a command's text nor its echo
is taken for the end. A command that reads its input can find the two words and print them: it ends
its own turn early, and nothing else.
"""

import re
import secrets

_ESCAPES = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles
    r"|\x1b[PX^_][^\x1b]*(?:\x1b\\)?"  # strings for devices
    r"|\x1b\[[0-?]*[ -/]*[@-~]?"  # colours, the cursor
    r"|\x1b[ -/]*[0-~]?"
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# The status of the command outlives the line, and no shell prompts after the next one.
_END = " eval \"printf %s%s {0} {1}; PS1=${{BASH:+'\\[\\]'}} PS2=; (exit $?)\" 2> /dev/null"


class Turns:
    """The turns on one terminal."""

    def __init__(self) -> None:
        self._words: list[tuple[str, str]] = []

    def type(self, command: str) -> bytes:
        """What to write to the terminal for the next command."""
        words = secrets.token_hex(8), secrets.token_hex(8)
        self._words.append(words)
        return f"{command}\n{_END.format(*words)}\n".encode("utf-8", "replace")

    def length(self, seen: bytes | bytearray) -> int:
        """Bytes of `seen` that belong to the turn; -1 while it goes on."""
        return seen.find("".join(self._words[-1]).encode())

    def show(self, seen: bytes | bytearray) -> str:
        """Output as text: no escapes, no control characters but tabs and ends of lines."""
        text = seen.decode("utf-8", "replace")
        for words in self._words:
            # Of turns that were given up, and of a program that echoes what it reads.
            text = text.replace("".join(words), "")
            text = re.sub(f"[^\n]*{words[0]}[^\n]*\n?", "", text)
        return _CONTROLS.sub("", _ESCAPES.sub("", text))
