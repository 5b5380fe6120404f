import sys


def normal(text):
    """Line ends as one kind, and none around."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


sys.exit(normal(sys.argv[1]) != normal(sys.argv[2]))
