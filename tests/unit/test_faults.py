"""docs/faults.md against the tests: every case has one that carries its number, and no test carries an unknown number."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
CASES = range(1, 92)


@cache
def marked() -> dict[int, dict[str, list[str]]]:
    """Tests by file by case; `dataset` is tests/unit/data/test_dataset.py, `pipeline/faults` is tests/pipeline/test_faults.py."""
    found: dict[int, dict[str, list[str]]] = {}
    for file in sorted(TESTS.rglob("test_*.py")):
        below = file.relative_to(TESTS)
        name = file.stem.removeprefix("test_")
        short = name if below.parts[0] == "unit" else below.with_name(name).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    assert isinstance(node, ast.FunctionDef) and node.name.startswith("test_"), f"{short}: {node}"
                    assert mark.args, f"{short}: {node.name}: a mark without a case"
                    for case in map(ast.literal_eval, mark.args):
                        found.setdefault(case, {}).setdefault(short, []).append(node.name)
    return found


@cache
def page() -> str:
    return (ROOT / "docs/faults.md").read_text(encoding="utf-8")


@cache
def rows() -> dict[int, list[str]]:
    """The files that the page names, by case."""
    found = re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", page(), re.MULTILINE)
    assert len(found) == len({case for case, _ in found}), "a case has two rows"
    return {int(case): re.findall(r"`([^`]+)`", files) for case, files in found}


def untested() -> set[int]:
    """Cases that the page says why no test asserts, or not all of."""
    lines = re.findall(r"^- ([\d, ]+): ", page().partition("## Not tested")[2], re.MULTILINE)
    return {int(case) for line in lines for case in line.split(",")}


def test_the_page_has_every_case() -> None:
    assert sorted(rows()) == list(CASES)


def test_no_mark_is_of_an_unknown_case() -> None:
    assert set(marked()) <= set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_case_has_the_tests_that_the_page_names(case: int) -> None:
    assert set(rows()[case]) <= set(marked().get(case, {})), marked().get(case)
    assert rows()[case] or case in untested(), "no test and no reason"
    assert bool(rows()[case]) == (case in marked()), "its tests are on the page"


def test_a_reason_is_of_a_case() -> None:
    assert untested() <= set(CASES)
