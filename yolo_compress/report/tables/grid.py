"""A table before it is drawn: the same cells in the terminal, in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Column:
    """`rank` says what goes first where the terminal is narrow (the highest); 0 always stays."""

    title: str
    right: bool = True
    rank: int = 0


class Field(NamedTuple):
    """A column, and how its cell is written of a row."""

    column: Column
    write: Callable[[Mapping[str, object]], str]


def field(title: str, key: str, write: Callable[[Any], str], rank: int = 0) -> Field:
    """A figure that a row has under a key, or has not."""
    return Field(Column(title, rank=rank), lambda row: write(row.get(key)))


def columns(fields: Sequence[Field]) -> tuple[Column, ...]:
    return tuple(one.column for one in fields)


def cells(fields: Sequence[Field], row: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(one.write(row) for one in fields)


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
