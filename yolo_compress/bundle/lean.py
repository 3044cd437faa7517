"""`runtime/` as it goes into a bundle: the same statements on the same lines, without comments, docstrings and the types of
functions, indented by one.

A third of its bytes are prose, a tenth is indentation, a tenth types. Module docstrings stay: they are what `--help` prints. Lines
keep their numbers, so a traceback from a robot reads against the repository.
"""

from __future__ import annotations

import ast
import io
import tokenize

INDENT = 4  # of the sources


def lean(source: str) -> str:
    """Python source without comments, docstrings and the types of arguments and results; each statement stays on its line.

    A docstring becomes `...`, which is a statement too, and so may be all that a class or function holds.
    """
    gaps = [(span, "...") for span in _docstrings(source)]
    gaps += [(span, "") for span in [*_comments(source), *_types(source)]]
    lines = source.splitlines()
    for (first, start, last, end), put in sorted(gaps, reverse=True):
        if first == last:
            lines[first] = (lines[first][:start] + put + lines[first][end:]).rstrip()
        else:
            lines[first : last + 1] = [lines[first][:start] + put + lines[last][end:]] + [""] * (last - first)
    return _indented_by_one("\n".join(lines) + "\n")


def _indented_by_one(source: str) -> str:
    """Four spaces of indentation as one; what lies within a string of several lines stays."""
    within = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno is not None
        for line in range(node.lineno, node.end_lineno)  # from 0, so from its second line on
    }
    lines = source.splitlines()
    for index, line in enumerate(lines):
        if index not in within:
            bare = line.lstrip(" ")
            lines[index] = " " * ((len(line) - len(bare)) // INDENT) + bare
    return "\n".join(lines) + "\n"


Span = tuple[int, int, int, int]  # first line and column, last line and column; lines from 0, columns in characters


def _types(source: str) -> list[Span]:
    """Of arguments, from the colon on, and of results, with the arrow; those of classes' fields do something, and stay."""
    rows = source.encode().splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg) and node.annotation:
            found.append(_span(rows, node.lineno, node.col_offset + len(node.arg.encode()), node))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns:
            line = node.returns.lineno
            arrow = rows[line - 1].rindex(b" ->", 0, node.returns.col_offset)
            found.append(_span(rows, line, arrow, node.returns))
    return found


def _span(rows: list[bytes], line: int, offset: int, until: ast.arg | ast.expr) -> Span:
    """From a place to the end of a node; ast counts lines from 1 and columns in bytes."""
    assert until.end_lineno is not None and until.end_col_offset is not None
    ends = ((line - 1, offset), (until.end_lineno - 1, until.end_col_offset))
    (first, start), (last, end) = ((row, len(rows[row][:column].decode())) for row, column in ends)
    return first, start, last, end


def _docstrings(source: str) -> list[Span]:
    """Strings that are statements, but for the module's first."""
    tree, rows = ast.parse(source), source.encode().splitlines()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            if node is tree.body[0]:
                continue
            found.append(_span(rows, node.lineno, node.col_offset, node.value))
    return found


def _comments(source: str) -> list[Span]:
    """Comments, but for a first line that names the interpreter."""
    return [
        (token.start[0] - 1, token.start[1], token.end[0] - 1, token.end[1])
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not (token.start == (1, 0) and token.string.startswith("#!"))
    ]
