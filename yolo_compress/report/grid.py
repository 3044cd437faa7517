"""A table before it is drawn: the same cells in the terminal, in Markdown and in HTML."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Column:
    """`rank` says what goes first where the terminal is narrow (the highest); 0 always stays."""

    title: str
    right: bool = True
    rank: int = 0


@dataclass(frozen=True)
class Line:
    """`group` is the runtime of a bench row; `mark` is what deserves the eye: reference, passed, failed, missing."""

    cells: tuple[str, ...]
    group: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    def groups(self) -> list[tuple[str, list[Line]]]:
        """Lines that stand under one row heading."""
        return [(group, list(lines)) for group, lines in groupby(self.lines, lambda line: line.group)]
