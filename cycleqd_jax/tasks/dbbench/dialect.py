"""MySQL statements as SQLite understands them, with MySQL's meaning.

`sqlglot` parses the statement and writes it for SQLite. What the two systems judge differently
(text against numbers, letters against their accents, what a number looks like once it is stored) is
rewritten to functions of `runner.py`, whose names begin with ``my_``. Statements come from a model:
their length, their depth and every error of the parser are bounded here.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

from cycleqd_jax.tasks.dbbench.errors import AgentError, syntax_error

try:
    from sqlglot import exp
    from sqlglot.dialects.mysql import MySQL
    from sqlglot.dialects.sqlite import SQLite
    from sqlglot.errors import ErrorLevel
except ImportError as missing:
    raise ImportError(
        "DBBench on SQLite needs sqlglot for MySQL's dialect: pip install 'cycleqd-jax[tasks]'"
    ) from missing

MAX_STATEMENT = 20_000  # characters
_MAX_TOKENS = 5_000
_MAX_MOVES = 50_000  # from token to token, back and forth; honest statements take one a token
_MAX_DEPTH = 40  # of brackets and CASEs
_MAX_LIST = 100  # SQLite's functions take 127 arguments

_COMPARISONS: dict[type, str] = {
    exp.EQ: "=",
    exp.NEQ: "<>",
    exp.LT: "<",
    exp.LTE: "<=",
    exp.GT: ">",
    exp.GTE: ">=",
}
_ARITHMETIC = (exp.Add, exp.Sub, exp.Mul, exp.Div, exp.Mod, exp.IntDiv)
_RENAMED: dict[type, str] = {exp.Left: "my_left", exp.Right: "my_right", exp.Rand: "my_rand"}


class _Parser(MySQL.Parser):  # type: ignore[misc, valid-type]
    """MySQL's parser, which gives up; in search of the ON of a JOIN it would try every subset."""

    _moves = 0

    def _advance(self, times: int = 1) -> None:
        self._moves += 1
        if self._moves > _MAX_MOVES:
            raise _too_complex()
        super()._advance(times)


@dataclass(frozen=True)
class Translated:
    """A statement for SQLite, and whether it may change the database."""

    sql: str
    writes: bool


class _Backticks(SQLite):
    """SQLite's dialect; a name in double quotes that is no column would be taken for text."""

    class Tokenizer(SQLite.Tokenizer):
        IDENTIFIERS: ClassVar[list[str | tuple[str, str]]] = ["`"]


def translate(statement: str, table: str) -> Translated | None:
    """Translate one statement on the database of that table.

    Args:
        statement: MySQL, by a model.
        table: name of the problem's table, and of its database.

    Returns:
        None if there is nothing to do (transactions, settings).

    Raises:
        AgentError: what MySQL would answer, or that this is not supported.
    """
    tree = _parse(statement, table)
    if isinstance(tree, exp.Set) and re.search(r"\b(GLOBAL|PERSIST)", statement, re.IGNORECASE):
        raise AgentError(1227, "Access denied; you need the SUPER privilege for this operation")
    if isinstance(tree, exp.Transaction | exp.Commit | exp.Rollback | exp.Set):
        return None
    if isinstance(tree, exp.Use):
        if tree.this.name != table:
            raise AgentError(
                1044, f"Access denied for user 'agent'@'localhost' to database '{tree.this.name}'"
            )
        return None
    if isinstance(tree, exp.Create | exp.Drop) and tree.kind not in ("TABLE", "VIEW", "INDEX"):
        raise AgentError(1044, "Access denied for user 'agent'@'localhost' to this statement")
    with _for_the_agent(statement):
        if isinstance(tree, exp.Describe | exp.Show):
            return Translated(_describe(tree, table), writes=False)
        _check_tables(tree, table)
        if isinstance(tree, exp.TruncateTable):
            tree = exp.Delete(this=tree.expressions[0])
        _rewrite(tree, table)
        sql = _Backticks().generate(
            tree, comments=False, identify=True, unsupported_level=ErrorLevel.IGNORE, copy=False
        )
    changes = exp.Insert | exp.Update | exp.Delete | exp.Create | exp.Drop | exp.Alter
    if not isinstance(tree, exp.Query | changes):
        raise AgentError(1235, "This version of MySQL doesn't yet support this statement")
    return Translated(sql, writes=isinstance(tree, changes))


def _parse(statement: str, table: str) -> exp.Expression:
    if len(statement) > MAX_STATEMENT:
        raise AgentError(1153, "Got a packet bigger than 'max_allowed_packet' bytes")
    # Without keys a REPLACE is an INSERT, and IGNORE has nothing to ignore.
    statement = re.sub(r"^\s*REPLACE\s+INTO\b", "INSERT INTO", statement, flags=re.IGNORECASE)
    statement = re.sub(r"^\s*UPDATE\s+IGNORE\b", "UPDATE", statement, flags=re.IGNORECASE)
    with _for_the_agent(statement):
        tokens = MySQL().tokenize(statement)
        if len(tokens) > _MAX_TOKENS or _depth(tokens) > _MAX_DEPTH:
            raise _too_complex()
        trees = [tree for tree in _Parser(dialect=MySQL()).parse(tokens, statement) if tree]
    if not trees:
        raise AgentError(1065, "Query was empty")
    if len(trees) > 1:
        raise syntax_error(statement.partition(";")[2].strip())
    tree = trees[0]
    assert isinstance(tree, exp.Expression)
    return tree


def _too_complex() -> AgentError:
    return AgentError(1436, "Thread stack overrun: the statement is too complex")


def _depth(tokens: list[Any]) -> int:
    depth = deepest = 0
    for token in tokens:
        word = token.text.upper()
        depth += (word in ("(", "CASE")) - (word in (")", "END"))
        deepest = max(deepest, depth)
    return deepest


@contextlib.contextmanager
def _for_the_agent(statement: str) -> Iterator[None]:
    """Whatever the parser stumbles over is the agent's syntax error, and is told to it alone."""
    logger = logging.getLogger("sqlglot")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except AgentError:
        raise
    # Not only the parser's own errors: on texts that are no SQL it can meet a TypeError too.
    except Exception as error:
        raise syntax_error(statement) from error
    finally:
        logger.setLevel(level)


def _describe(tree: exp.Expression, table: str) -> str:
    """DESCRIBE and SHOW as queries on SQLite's own catalogue."""
    what = str(tree.name).upper() if isinstance(tree, exp.Show) else "COLUMNS"
    target = tree.args.get("target") if isinstance(tree, exp.Show) else tree.this
    name = exp.Literal.string(getattr(target, "name", "")).sql("sqlite")
    if what == "TABLES":
        return "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY 1"
    if what == "DATABASES":
        own = exp.Literal.string(table).sql("sqlite")
        return f"SELECT 'information_schema' UNION ALL SELECT {own}"
    if what == "CREATE TABLE":
        return f"SELECT name, sql FROM sqlite_master WHERE name = {name}"
    if what != "COLUMNS" or not isinstance(target, exp.Table | exp.Identifier | exp.Column):
        raise AgentError(1235, "This version of MySQL doesn't yet support this statement")
    return (
        "SELECT name, lower(type), iif(\"notnull\", 'NO', 'YES'), iif(pk, 'PRI', ''), dflt_value, "
        f"'' FROM pragma_table_info({name})"
    )


def _check_tables(tree: exp.Expression, table: str) -> None:
    """Names of tables are MySQL's on Linux: exact, of this database, and none of SQLite's own."""
    known = {cte.alias for cte in tree.find_all(exp.CTE)}
    for found in tree.find_all(exp.Table):
        name = found.name
        other = found.db if found.db != table else ""
        wrong_case = name.casefold() == table.casefold() and name != table
        if name in known and not found.db:
            continue
        if other or wrong_case or name.casefold().startswith(("sqlite_", "pragma_")):
            raise AgentError(1146, f"Table '{other or table}.{name}' doesn't exist")
        found.set("db", None)


def _rewrite(tree: exp.Expression, table: str) -> None:
    # Children first; they keep their place in a parent that is replaced later.
    for node in reversed(list(tree.walk(bfs=False))):
        rule = next((_RULES[kind] for kind in type(node).__mro__ if kind in _RULES), None)
        new = rule(node) if rule else None
        if new is not None:
            node.replace(new)
    for node in tree.find_all(exp.CurrentSchema):
        node.replace(exp.Literal.string(table))
    if isinstance(tree, exp.Insert):
        _store_inserted(tree)
    if isinstance(tree, exp.Update):
        _store_updated(tree)
    if isinstance(tree, exp.Update | exp.Delete):
        _limit_change(tree)


def _call(name: str, *arguments: Any) -> exp.Anonymous:
    return exp.Anonymous(this=name, expressions=list(arguments))


def _compare(node: exp.Expression) -> exp.Expression | None:
    assigns = isinstance(node.parent, exp.Update) and node.arg_key == "expressions"
    left, right = node.this, node.expression
    if assigns or isinstance(left, exp.Tuple) or isinstance(right, exp.Tuple | exp.Any | exp.All):
        return None
    return exp.Paren(
        this=type(node)(this=_call("my_compare", left, right), expression=exp.Literal.number(0))
    )


def _between(node: exp.Expression) -> exp.Expression:
    value, zero = node.this, exp.Literal.number(0)
    low = exp.GTE(this=_call("my_compare", value, node.args["low"]), expression=zero)
    high = exp.LTE(this=_call("my_compare", value.copy(), node.args["high"]), expression=zero)
    return exp.Paren(this=exp.And(this=low, expression=high.copy()))


def _in(node: exp.Expression) -> exp.Expression | None:
    values = node.expressions
    if not values or len(values) > _MAX_LIST or isinstance(node.this, exp.Tuple):
        return None
    return _call("my_in", node.this, *values)


def _number(node: Any) -> Any:
    plain = isinstance(node, exp.Literal) and not node.is_string
    return node if plain or isinstance(node, _ARITHMETIC) else _call("my_number", node)


def _calculate(node: exp.Expression) -> None:
    if not isinstance(node.expression, exp.Interval):
        node.set("this", _number(node.this))
        node.set("expression", _number(node.expression))


def _divide(node: exp.Expression) -> exp.Expression:
    # sqlglot would make the dividend a float by copying it, at every division of a long chain.
    _calculate(node)
    quotient = exp.Div(
        this=exp.Cast(this=node.this, to=exp.DataType.build("DOUBLE")),
        expression=node.expression,
        typed=True,
    )
    if isinstance(node, exp.IntDiv):
        return exp.Cast(this=quotient, to=exp.DataType.build("BIGINT"))
    return quotient


def _aggregate(node: exp.Expression) -> None:
    inner = node.this
    if isinstance(inner, exp.Distinct):
        inner.set("expressions", [_number(value) for value in inner.expressions])
    elif inner is not None:
        node.set("this", _number(inner))


def _cast(node: exp.Expression) -> exp.Expression | None:
    kind = node.args["to"]
    if kind.is_type(*exp.DataType.INTEGER_TYPES):
        return _call("my_integer", node.this)
    if kind.is_type(exp.DataType.Type.DECIMAL):
        sizes = [size.this for size in kind.expressions]
        return _call("my_decimal", node.this, sizes[1] if len(sizes) > 1 else exp.Literal.number(0))
    if kind.is_type(*exp.DataType.TEXT_TYPES):
        return _call("my_text", node.this)
    return None


def _collate(node: exp.Expression) -> None:
    binary = node.expression.name.lower().endswith("_bin") or node.expression.name == "binary"
    node.set("expression", exp.to_identifier("BINARY" if binary else "mysql"))


def _group_concat(node: exp.Expression) -> exp.Expression:
    value, key, descending = node.this, None, False
    if isinstance(value, exp.Order):
        key, descending = value.expressions[0].this, bool(value.expressions[0].args.get("desc"))
        value = value.this
    distinct = isinstance(value, exp.Distinct)
    if isinstance(value, exp.Distinct):
        value = value.expressions[0]
    separator = node.args.get("separator") or exp.Literal.string(",")
    flags = exp.Literal.number(distinct + 2 * descending)
    return _call("my_group_concat", value, separator, key or exp.Null(), flags)


def _rename(node: exp.Expression) -> exp.Expression:
    arguments = [value for value in node.args.values() if isinstance(value, exp.Expression)]
    return _call(_RENAMED[type(node)], *arguments)


def _truncate(node: exp.Expression) -> exp.Expression:
    return _call("my_truncate", node.this, node.args.get("decimals") or exp.Literal.number(0))


def _having(node: exp.Select) -> None:
    # MySQL takes HAVING without groups for a WHERE that knows the aliases, as SQLite's WHERE does.
    having = node.args.get("having")
    if having and not node.args.get("group") and not any(node.find_all(exp.AggFunc)):
        node.set("having", None)
        node.where(having.this, copy=False)


_RULES: dict[type, Callable[[Any], exp.Expression | None]] = {
    **dict.fromkeys(_COMPARISONS, _compare),
    **dict.fromkeys(_ARITHMETIC, _calculate),
    exp.Div: _divide,
    exp.IntDiv: _divide,
    **dict.fromkeys(_RENAMED, _rename),
    exp.Between: _between,
    exp.In: _in,
    exp.Sum: _aggregate,
    exp.Avg: _aggregate,
    exp.Cast: _cast,
    exp.Collate: _collate,
    exp.GroupConcat: _group_concat,
    exp.Select: _having,
    exp.Trunc: _truncate,
}


def _stored(value: exp.Expression) -> exp.Expression:
    """The text that MySQL puts in a TEXT column for a value."""
    negative = isinstance(value, exp.Neg)
    literal = value.this if negative else value
    if isinstance(literal, exp.Literal):
        if literal.is_string or "e" in literal.name.lower():
            return value
        return exp.Literal.string(f"{'-' * negative}{Decimal(literal.name):f}")
    if isinstance(value, exp.Column | exp.Null | exp.Boolean | exp.Subquery):
        return value
    return _call("my_text", value)


def _store_inserted(tree: exp.Insert) -> None:
    values = tree.expression
    if isinstance(values, exp.Values):
        for row in values.expressions:
            row.set("expressions", [_stored(value) for value in row.expressions])


def _store_updated(tree: exp.Update) -> None:
    for assignment in tree.expressions:
        column = assignment.this
        if isinstance(column, exp.Column):
            column.set("table", None)
            column.set("db", None)
        assignment.set("expression", _stored(assignment.expression))


def _limit_change(tree: exp.Update | exp.Delete) -> None:
    """ORDER BY and LIMIT of a change, which not every SQLite has, as a choice of rows."""
    if len(tree.args.get("tables") or ()) == 1:
        tree.set("tables", None)  # DELETE t FROM t
    order, limit, where = (tree.args.get(name) for name in ("order", "limit", "where"))
    if not limit:
        tree.set("order", None)  # without a limit it changes nothing
        return
    rows = exp.select("rowid").from_(tree.this.copy())
    for name, part in (("where", where), ("order", order), ("limit", limit)):
        rows.set(name, part)
    for name in ("order", "limit"):
        tree.set(name, None)
    chosen = exp.In(this=exp.column("rowid"), query=rows.subquery())
    tree.set("where", exp.Where(this=chosen))
