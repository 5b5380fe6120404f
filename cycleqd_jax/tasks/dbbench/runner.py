"""Runs in the sandbox: SQLite with the functions that a MySQL statement expects.

Reads one JSON object on standard input: the table, the changes made so far, the statement. Writes
one: the reply, whether it is an error, and the hash of the table. `dialect.py` writes the calls of
the functions named ``my_``.
"""

import hashlib
import json
import math
import random
import re
import sqlite3
import sys
import unicodedata
from datetime import datetime
from functools import lru_cache

MAX_REPLY = 800
MAX_LENGTH = 1 << 20  # bytes of a value or statement
MAX_PAGES = 1 << 14  # of 4 KiB
STRIDE = 1000  # instructions between two looks at the budget

_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")
_INTEGER = re.compile(r"\s*([+-]?\d+)")
# The order of Unicode's collation: spaces and punctuation, digits, letters.
_PUNCTUATION = {char: rank for rank, char in enumerate(" \t\n\r_-,;:!?.'\"()[]{}@*/\\&#%`^+<=>|~$")}
# Letters that Unicode does not decompose but its collation does.
_LETTERS = str.maketrans({"ø": "o", "đ": "d", "ł": "l", "æ": "ae", "œ": "oe", "ħ": "h", "ŧ": "t"})


class OutOfBudget(Exception):  # noqa: N818
    """The statement took more instructions than it may."""


@lru_cache(maxsize=4096)
def fold(text):
    """A text without case and accents."""
    folded = text.casefold()
    if folded.isascii():
        return folded
    plain = unicodedata.normalize("NFKD", folded.translate(_LETTERS))
    return "".join(char for char in plain if not unicodedata.combining(char))


@lru_cache(maxsize=4096)
def sort_key(text):
    """Equal for texts that differ in case or accents only, else in the collation's order."""
    return tuple(_rank(char) for char in fold(text))


def _rank(char):
    if char in _PUNCTUATION:
        return 0, _PUNCTUATION[char]
    group = unicodedata.category(char)[0]
    return (2 if group == "N" else 3 if group in "LM" else 1), ord(char)


def collate(left, right):
    """The order of two texts."""
    a, b = sort_key(left), sort_key(right)
    return (a > b) - (a < b)


def number(value):
    """A value as MySQL calculates with it: text counts as far as it is a number."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        found = _NUMBER.match(value)
        return float(found[1]) if found else 0.0
    return value


def compare(left, right):
    """Negative, zero or positive; None beside a NULL."""
    if left is None or right is None:
        return None
    if isinstance(left, str) and isinstance(right, str):
        return collate(left, right)
    if isinstance(left, bytes) and isinstance(right, bytes):
        return (left > right) - (left < right)
    a, b = number(left), number(right)
    return (a > b) - (a < b)


def contains(value, *choices):
    """IN, with its NULLs."""
    if value is None:
        return None
    found = [compare(value, choice) for choice in choices]
    return 1 if 0 in found else None if None in found else 0


def text(value):
    """A value as MySQL writes it."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        return repr(value).replace("e+", "e")
    return None if value is None else str(value)


def integer(value):
    """CAST AS SIGNED."""
    if isinstance(value, str):
        found = _INTEGER.match(value)
        value = int(found[1][:30]) if found else 0
    if isinstance(value, float):
        value = math.floor(abs(value) + 0.5) * (1 if value > 0 else -1) if abs(value) < 1e19 else 0
    return None if value is None else max(-(1 << 63), min(int(value), (1 << 63) - 1))


def decimal(value, scale):
    """CAST AS DECIMAL, as a float."""
    value = number(value)
    if value is None or not scale:
        return integer(value)
    shift = 10.0 ** min(int(scale), 15)
    return math.copysign(math.floor(abs(value) * shift + 0.5) / shift, value)


def truncate(value, places):
    """TRUNCATE."""
    value = number(value)
    if value is None or places is None or abs(value) > 1e15:
        return value
    shift = 10.0 ** max(-15, min(int(places), 15))
    return math.trunc(value * shift) / shift


def left(value, count):
    """LEFT."""
    return None if value is None or count is None else text(value)[: max(int(count), 0)]


def right(value, count):
    """RIGHT."""
    if value is None or count is None:
        return None
    return text(value)[-int(count) :] if int(count) > 0 else ""


def like(pattern, value, escape="\\"):
    """LIKE: % is any text, _ one character."""
    if pattern is None or value is None:
        return None
    tokens, pending = [], False
    for char in text(pattern):
        if pending or char not in (escape, "%", "_"):
            tokens += fold(char)
            pending = False
        elif char == escape:
            pending = True
        else:
            tokens.append(None if char == "_" else "%%")
    tokens += escape if pending else ""
    return _matches(tokens, fold(text(value)))


def _matches(tokens, value):
    at = place = 0
    star, resume = -1, 0
    while at < len(value):
        token = tokens[place] if place < len(tokens) else ""
        if token == "%%":
            star, resume = place, at
            place += 1
        elif token is None or token == value[at]:
            at, place = at + 1, place + 1
        elif star >= 0:
            resume += 1
            at, place = resume, star + 1
        else:
            return 0
    return int(all(token == "%%" for token in tokens[place:]))


def regexp(pattern, value):
    """REGEXP."""
    if pattern is None or value is None:
        return None
    return int(re.search(text(pattern), text(value), re.IGNORECASE) is not None)


def regexp_replace(value, pattern, new):
    """REGEXP_REPLACE."""
    if None in (value, pattern, new):
        return None
    return re.sub(text(pattern), text(new).replace("$", "\\"), text(value), flags=re.IGNORECASE)


def regexp_substr(value, pattern):
    """REGEXP_SUBSTR."""
    found = None if None in (value, pattern) else re.search(pattern, value, re.IGNORECASE)
    return found and found[0]


def concat_ws(separator, *values):
    """CONCAT_WS."""
    if separator is None:
        return None
    return text(separator).join(text(value) for value in values if value is not None)


def substring_index(value, separator, count):
    """SUBSTRING_INDEX."""
    if None in (value, separator, count):
        return None
    parts, count = text(value).split(separator) if separator else [""], int(count)
    return separator.join(parts[:count] if count >= 0 else parts[count:])


def pad(value, length, fill, leading):
    """LPAD and RPAD."""
    if None in (value, length, fill) or not 0 <= length <= MAX_LENGTH:
        return None
    value, length = text(value), int(length)
    missing = length - len(value)
    if missing > 0 and not fill:
        return None
    padding = (fill * missing)[: max(missing, 0)]
    return (padding + value if leading else value + padding)[:length]


def repeat(value, count):
    """REPEAT."""
    if value is None or count is None or len(text(value)) * int(count) > MAX_LENGTH:
        return None
    return text(value) * int(count)


def grouped(value, places):
    """FORMAT: digits in groups of three."""
    return None if value is None else f"{number(value):,.{max(0, min(int(places), 30))}f}"


def md5(value):
    """MD5."""
    return None if value is None else hashlib.md5(text(value).encode()).hexdigest()


def field(value, *choices):
    """FIELD."""
    for place, choice in enumerate(choices, 1):
        if compare(value, choice) == 0:
            return place
    return 0


def find_in_set(value, choices):
    """FIND_IN_SET."""
    return None if None in (value, choices) else field(text(value), *text(choices).split(","))


def part_of_date(pattern):
    """YEAR, MONTH and DAY."""

    def read(value):
        found = re.match(r"(\d{4})-(\d\d?)-(\d\d?)", value or "")
        return int(found[pattern]) if found else None

    return read


def str_to_date(value, pattern):
    """STR_TO_DATE."""
    if value is None or pattern is None:
        return None
    for theirs, ours in (("%M", "%B"), ("%e", "%d"), ("%c", "%m"), ("%i", "%M"), ("%s", "%S")):
        pattern = pattern.replace(theirs, ours)
    try:
        moment = datetime.strptime(value, pattern)
    except ValueError:
        return None
    return str(moment) if "%H" in pattern else str(moment.date())


class GroupConcat:
    """GROUP_CONCAT with its ORDER BY of one key; flags: 1 distinct, 2 descending."""

    def __init__(self):
        self.found, self.separator, self.flags = [], ",", 0

    def step(self, value, separator, key, flags):
        """Take one row."""
        self.separator, self.flags = text(separator), flags
        if value is not None:
            key = (key is not None, sort_key(key) if isinstance(key, str) else key or 0)
            self.found.append((key, text(value)))

    def finalize(self):
        """Join them."""
        values = [v for _, v in sorted(self.found, key=lambda p: p[0], reverse=self.flags > 1)]
        if self.flags % 2:
            values = list({fold(value): value for value in reversed(values)}.values())[::-1]
        return self.separator.join(values) if values else None


FUNCTIONS = (
    ("my_compare", 2, compare),
    ("my_in", -1, contains),
    ("my_number", 1, number),
    ("my_text", 1, text),
    ("my_integer", 1, integer),
    ("my_decimal", 2, decimal),
    ("my_truncate", 2, truncate),
    ("my_left", 2, left),
    ("my_right", 2, right),
    ("like", 2, like),
    ("like", 3, like),
    ("regexp", 2, regexp),
    ("REGEXP_REPLACE", 3, regexp_replace),
    ("REGEXP_SUBSTR", 2, regexp_substr),
    ("CONCAT_WS", -1, concat_ws),
    ("SUBSTRING_INDEX", 3, substring_index),
    ("LPAD", 3, lambda value, length, fill: pad(value, length, fill, True)),
    ("RPAD", 3, lambda value, length, fill: pad(value, length, fill, False)),
    ("REVERSE", 1, lambda value: None if value is None else text(value)[::-1]),
    ("REPEAT", 2, repeat),
    ("NUMBER_TO_STR", 2, grouped),
    ("FIELD", -1, field),
    ("FIND_IN_SET", 2, find_in_set),
    ("YEAR", 1, part_of_date(1)),
    ("MONTH", 1, part_of_date(2)),
    ("DAY", 1, part_of_date(3)),
    ("STR_TO_DATE", 2, str_to_date),
    ("NOW", 0, lambda: str(datetime.now())[:19]),
    ("MD5", 1, md5),
)

# SQLite's complaints, and what MySQL says.
COMPLAINTS = (
    (r"no such table: (?:main\.)?(.*)", "1146 (42S02): Table '{db}.{0}' doesn't exist"),
    (r"no such column: (.*)", "1054 (42S22): Unknown column '{0}' in 'field list'"),
    (r"table .* has no column named (.*)", "1054 (42S22): Unknown column '{0}' in 'field list'"),
    (r"ambiguous column name: (.*)", "1052 (23000): Column '{0}' in field list is ambiguous"),
    (r"no such function: (.*)", "1305 (42000): FUNCTION {db}.{0} does not exist"),
    (r"table .* has \d+ columns but .*|\d+ values for \d+ columns",
     "1136 (21S01): Column count doesn't match value count at row 1"),
    (r"table `?(.*?)`? already exists", "1050 (42S01): Table '{0}' already exists"),
    (r"not authorized.*|access to .* is prohibited", "1142 (42000): command denied to user"),
    (r"misuse of (?:aggregate|window) .*", "1111 (HY000): Invalid use of group function"),
    (r'near "(.*)": syntax error|incomplete input|unrecognized token: "?(.*)"?',
     "1064 (42000): You have an error in your SQL syntax; check the manual that corresponds to your"
     " MySQL server version for the right syntax to use near '{0}' at line 1"),
)  # fmt: skip


def complaint(error, database):
    """SQLite's error in MySQL's words."""
    for pattern, ours in COMPLAINTS:
        found = re.fullmatch(pattern, str(error), re.DOTALL)
        if found:
            return ours.format(next(filter(None, found.groups()), ""), db=database)
    return f"1105 (HY000): {error}"


def quote(name):
    """A name as SQL writes it, never taken for a text."""
    return "`" + name.replace("`", "``") + "`"


def connect(table):
    """A database in memory that holds the table, and whose statements cannot leave it."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_LENGTH)
    db.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    db.execute(f"PRAGMA max_page_count = {MAX_PAGES}")
    db.create_collation("mysql", collate)
    for name, arguments, function in FUNCTIONS:
        db.create_function(name, arguments, function, deterministic=name != "NOW")
    # The same numbers for the same statement, whoever runs it again.
    chance = random.Random(0)
    db.create_function("my_rand", -1, lambda *_: chance.random())
    db.create_aggregate("my_group_concat", 4, GroupConcat)  # type: ignore[arg-type]
    columns = ", ".join(f"{quote(name)} TEXT COLLATE mysql" for name in table["columns"])
    db.execute(f"CREATE TABLE {quote(table['name'])} ({columns})")
    places = ", ".join("?" * len(table["columns"]))
    db.executemany(f"INSERT INTO {quote(table['name'])} VALUES ({places})", table["rows"])
    db.set_authorizer(authorize)
    return db


def authorize(action, first, second, *_):
    """No files, no settings, no extensions."""
    if action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH):
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_PRAGMA and first != "table_info":
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_FUNCTION and second.lower() == "load_extension":
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def execute(db, statement, instructions):
    """As many rows as fit in a reply, as Python shows them."""
    left = [instructions // STRIDE]

    def spend():
        left[0] -= 1
        return left[0] < 0

    db.set_progress_handler(spend, STRIDE)
    try:
        rows, size = [], 2
        for row in db.execute(statement):
            rows.append(row)
            size += len(str(row)) + 2
            if size > MAX_REPLY + 10:
                break
        shown = str(rows)
        return shown if len(shown) <= MAX_REPLY else shown[:MAX_REPLY] + "[TRUNCATED]"
    except sqlite3.OperationalError as error:
        if left[0] < 0:
            raise OutOfBudget from error
        raise
    finally:
        db.set_progress_handler(None, 0)


def table_hash(db, table):
    """What MySQL's hash query would return for the table as it is now."""
    columns = ", ".join(map(quote, table["columns"]))
    try:
        rows = db.execute(f"SELECT {columns} FROM main.{quote(table['name'])}").fetchall()
    except sqlite3.Error as error:
        return str(error)
    joined = (",".join(text(cell) for cell in row if cell is not None) for row in rows)
    hashes = sorted(hashlib.md5(row.encode()).hexdigest()[:5] for row in joined)
    digest = hashlib.md5(",".join(hashes).encode()).hexdigest() if hashes else None
    return str([(digest,)])


def main():
    """One job."""
    task = json.load(sys.stdin)
    table, failed = task["table"], False
    db = connect(table)
    try:
        for change in task["changes"]:
            execute(db, change, task["instructions"])
        reply = execute(db, task["statement"], task["instructions"])
    except OutOfBudget:
        return sys.exit(3)
    except (sqlite3.Error, sqlite3.Warning, UnicodeError, OverflowError) as error:
        reply, failed = complaint(error, table["name"]), True
    json.dump({"reply": reply, "failed": failed, "hash": table_hash(db, table)}, sys.stdout)


if __name__ == "__main__":
    main()
