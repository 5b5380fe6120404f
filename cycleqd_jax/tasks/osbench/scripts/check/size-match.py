# The original looks for "B" before "KB", "MB" and so on, and takes whole numbers only: answers such
# as 20KB or 1.2G end in an error, which fails them. Scores would not compare without that.
import sys

POWERS = {"Byte": 0, "B": 0}
for power, letter in enumerate("KMGTP", 1):
    POWERS |= {letter + "B": power, letter: power}
UNITS = ["Byte", "B", *(unit for unit in POWERS if unit not in ("Byte", "B"))]


def size(text):
    """Bytes of an answer such as "20 KB"; raises ValueError where the original does."""
    text = text.strip()
    for unit in UNITS:
        if text.endswith(unit):
            return int(text[: -len(unit)]) * 1024 ** POWERS[unit]
    return int(text)


sys.exit(size(sys.argv[1]) != size(sys.argv[2]))
