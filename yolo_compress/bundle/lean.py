"""`runtime/` as it goes into a bundle: the same statements on the same lines, without comments and docstrings, indented by one.

A third of its bytes are prose, a tenth is indentation. A module's docstring stays where the module uses `__doc__`: it is what
`--help` prints. Lines keep their numbers, so a traceback from a robot reads against the repository.
"""

from __future__ import annotations

import ast
import io
import tokenize

INDENT = 4  # of the sources


def lean(source: str) -> str:
    """Python source without comments and docstrings; each statement stays on its line.

    A docstring becomes `...`, which is a statement too, and so may be all that a class or function holds; a module's becomes `""`,
    which may stand before an import of `__future__`.
    """
    gaps = [*_docstrings(source), *((span, "") for span in _comments(source))]
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


def _docstrings(source: str) -> list[tuple[Span, str]]:
    """Strings that are statements and what takes their place; without a module's own where `__doc__` is used."""
    tree, rows = ast.parse(source), source.encode().splitlines()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            own = node is tree.body[0]
            if own and "__doc__" in source:
                continue
            assert node.end_lineno is not None and node.end_col_offset is not None
            first, last = node.lineno - 1, node.end_lineno - 1
            columns = [  # ast counts bytes
                len(rows[line][:offset].decode())
                for line, offset in ((first, node.col_offset), (last, node.end_col_offset))
            ]
            found.append(((first, columns[0], last, columns[1]), '""' if own else "..."))
    return found


def _comments(source: str) -> list[Span]:
    """Comments, but for a first line that names the interpreter."""
    return [
        (token.start[0] - 1, token.start[1], token.end[0] - 1, token.end[1])
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not (token.start == (1, 0) and token.string.startswith("#!"))
    ]
