"""Errors that belong to the agent: it reads them as the database's reply."""

# MySQL's codes and their SQL states, as far as agents meet them; the others are HY000.
_STATES = {
    1044: "42000",
    1049: "42000",
    1050: "42S01",
    1051: "42S02",
    1052: "23000",
    1054: "42S22",
    1060: "42S21",
    1062: "23000",
    1064: "42000",
    1065: "42000",
    1111: "HY000",
    1136: "21S01",
    1142: "42000",
    1146: "42S02",
    1153: "08S01",
    1227: "42000",
    1235: "42000",
    1241: "21000",
    1242: "21000",
    1305: "42000",
    1370: "42000",
}


class AgentError(Exception):
    """The database refuses a statement; the text is what MySQL's client would show."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code} ({_STATES.get(code, 'HY000')}): {message}")


def syntax_error(near: str) -> AgentError:
    """MySQL's answer to what it cannot read from there on."""
    return AgentError(
        1064,
        "You have an error in your SQL syntax; check the manual that corresponds to your MySQL "
        f"server version for the right syntax to use near '{near[:80]}' at line 1",
    )


class OutOfLimits(Exception):  # noqa: N818
    """A statement took more than it may: the problem is failed."""
