"""What goes into a bundle does what the source does, line for line, and Python 3.8 parses it."""

from __future__ import annotations

import ast
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


class Bare(ast.NodeTransformer):
    """Without types of functions and without strings and `...` that are statements of their own."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        if isinstance(node.value, ast.Constant):
            node.value.value = ...
        return node


def form(source: str) -> list[tuple[str, int]]:
    """All that is computed, and the line of each part of it."""
    tree = Bare().visit(ast.parse(source, feature_version=(3, 8)))
    return [(ast.dump(node), getattr(node, "lineno", 0)) for node in ast.walk(tree)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_same_code_on_the_same_lines(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    small = lean(source)
    assert statements(small) == statements(source)
    assert form(small) == form(source)
    assert ast.get_docstring(ast.parse(small)) == ast.get_docstring(ast.parse(source)), "--help prints it"
    assert len(small) <= len(source)


def test_what_goes() -> None:
    source = '''"""Module."""
x = "# no comment"  # a comment
# another
class A:
    """Nothing else."""
def f(x: "int | str" = 1, *rest: bytes) -> str:
    """Über
    two lines."""; return "é"  # and this
s = """kept
    # kept too"""
'''
    assert (
        lean(source)
        == '''"""Module."""
x = "# no comment"

class A:
 ...
def f(x = 1, *rest):
 ...; return "é"

s = """kept
    # kept too"""
'''
    )
