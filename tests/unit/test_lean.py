"""What goes into a bundle does what the source does, line for line, and Python 3.8 parses it."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

from yolo_compress import runtime
from yolo_compress.bundle.lean import lean

FILES = sorted(Path(str(runtime.__file__)).parent.glob("*.py"))


def statements(source: str) -> list[tuple[int, str]]:
    """Line and form of each statement; strings and `...` that are statements of their own do nothing."""
    found = []
    for node in ast.walk(ast.parse(source, feature_version=(3, 8))):
        if isinstance(node, ast.stmt) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            found.append((node.lineno, type(node).__name__))
    return sorted(found)


def tokens(source: str) -> list[tuple[str, int]]:
    """Everything but comments, blank lines, docstrings and what stands in their place."""
    kept, line = [], list[tokenize.TokenInfo]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            continue
        line.append(token)
        if token.type == tokenize.NEWLINE:
            alone = len(line) == 2 and (line[0].type == tokenize.STRING or line[0].string == "...")
            kept += [] if alone else [(one.string, one.start[0]) for one in line]
            line = []
    return kept


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_same_code_on_the_same_lines(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    small = lean(source)
    assert statements(small) == statements(source)
    assert tokens(small) == tokens(source)
    if "__doc__" in source:
        assert ast.get_docstring(ast.parse(small)) == ast.get_docstring(ast.parse(source)), "--help prints it"
    compile(small, file.name, "exec")  # an import of __future__ still comes first
    assert len(small) <= len(source)


def test_what_goes() -> None:
    source = '''"""Module."""
x = "# no comment"  # a comment
# another
class A:
    """Nothing else."""
def f() -> str:
    """Über
    two lines."""; return "é"  # and this
s = """kept
    # kept too"""
'''
    assert (
        lean(source)
        == '''""
x = "# no comment"

class A:
 ...
def f() -> str:
 ...; return "é"

s = """kept
    # kept too"""
'''
    )
