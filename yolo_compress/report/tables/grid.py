"""Tables as plain data. The terminal, Markdown and HTML forms are drawn from the same cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Column:
    """A column. On a narrow terminal, the column with the highest `rank` is left out first. A column of rank 0 is always shown."""

    title: str
    right: bool = True
    rank: int = 0


class Field(NamedTuple):
    """A column, and the function that writes its cell for a row."""

    column: Column
    write: Callable[[Mapping[str, object]], str]


def field(title: str, key: str, write: Callable[[Any], str], rank: int = 0) -> Field:
    """Return a field that shows the value of `key`. A row may lack this key."""
    return Field(Column(title, rank=rank), lambda row: write(row.get(key)))


def columns(fields: Sequence[Field]) -> tuple[Column, ...]:
    return tuple(one.column for one in fields)


def cells(fields: Sequence[Field], row: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(one.write(row) for one in fields)


@dataclass(frozen=True)
class Line:
    """A line of a table.

    Attributes:
        cells: Text of each column.
        group: Lines with the same group have one row heading. For a bench row it is the runtime.
        mark: Highlights the line: "reference", "passed", "failed", "missing" or empty.
    """

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
        """Return (row heading, its lines)."""
        return [(group, list(lines)) for group, lines in groupby(self.lines, lambda line: line.group)]
