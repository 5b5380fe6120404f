"""The program in what a model said."""

import ast
import re
import warnings
from collections.abc import Iterator

# A block that is never closed ends with the text.
_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_START = re.compile(r"(?:import|from|def|class|async|@|[A-Za-z_]\w* *=)")
_MOST_STARTS, _MOST_CUTS, _MOST_TEXT = 20, 40, 100_000


def find_program(text: str, function: str, stub: str = "") -> str:
    """The code in an answer, without what it does beside defining things.

    The first fenced block that defines the function; without one the text itself, from the first
    line that can begin a program on. What comes after the last line that is Python is left out.
    Then bare expressions, asserts and a ``__main__`` block are taken away: an example or a test of
    the model's own must not decide (EvalPlus's sanitizer does the same).

    Args:
        text: what the model said.
        function: the name to define.
        stub: a beginning that the answer may continue (HumanEval's prompt).

    Returns:
        A program that defines the function if there is any such reading, else the text.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")[:_MOST_TEXT]
    for code in _readings(text, stub):
        program = _longest_program(code)
        if program is not None and defines(program, function):
            return _only_definitions(program)
    return text


def parse(program: str) -> ast.Module:
    """Its syntax tree, without Python's warnings about it.

    Raises:
        SyntaxError, ValueError, MemoryError, RecursionError: it is none, or too deep.
    """
    with warnings.catch_warnings():
        # Odd escapes in somebody's program are no concern of whoever runs us.
        warnings.simplefilter("ignore")
        return ast.parse(program)


def defines(program: str, function: str) -> bool:
    """Whether the function's name is bound at the program's top level."""
    tree = _parse(program)
    for node in tree.body if tree else []:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            if node.name == function:
                return True
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.If | ast.Try | ast.ImportFrom):
            for part in ast.walk(node):
                if function == _bound_name(part):
                    return True
    return False


def _bound_name(node: ast.AST) -> str | None:
    if isinstance(node, ast.alias):
        return node.asname or node.name
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    return node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None


def _readings(text: str, stub: str) -> Iterator[str]:
    blocks = [block for block in _FENCE.findall(text) if block.strip()]
    yield from blocks
    yield text
    lines = text.split("\n")
    starts = [number for number, line in enumerate(lines) if _START.match(line)]
    for number in starts[:_MOST_STARTS]:
        yield "\n".join(lines[number:])
    if stub:
        for rest in (*blocks, text):
            yield stub + rest


def _longest_program(code: str) -> str | None:
    """As many of the first lines as are Python."""
    lines = code.split("\n")
    for _ in range(_MOST_CUTS):
        try:
            parse("\n".join(lines))
            return "\n".join(lines)
        except SyntaxError as error:
            keep = min((error.lineno or 1) - 1, len(lines) - 1)
            if keep < 1:
                return None
            del lines[keep:]
        except (ValueError, MemoryError, RecursionError):
            return None
    return None


def _only_definitions(program: str) -> str:
    tree = _parse(program)
    data = program.encode()
    starts = [0]
    for line in data.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    for node in reversed(tree.body if tree else []):
        if isinstance(node, ast.Expr | ast.Assert) or _is_main_block(node):
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
            data = data[:begin] + b"pass" + data[end:]
    return data.decode()


def _is_main_block(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and any(
        isinstance(part, ast.Name) and part.id == "__name__" for part in ast.walk(node.test)
    )


def _parse(program: str) -> ast.Module | None:
    try:
        return parse(program)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
