"""What a rule and a finding are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from yolo_compress.lint.graph import Graph
from yolo_compress.lint.targets import RUNTIMES, Target

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
Hits = Iterator[tuple[str, str]]  # (node, or tensor where no node makes it; what is there)
WHOLE = "graph"  # the node of a hit that concerns the whole file


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        id: short, stable; users grep for it.
        severity: "error": the target refuses the file or computes something else; "warning": slower or less accurate than
            it has to be; "info": worth knowing, nothing need be done.
        consequence: what happens if nothing is done.
        fix: what to do.
        find: yields the places.
        runtimes: where it applies.
    """

    id: str
    severity: Severity
    consequence: str
    fix: str
    find: Callable[[Graph, Target], Hits]
    runtimes: tuple[str, ...] = RUNTIMES


@dataclass(frozen=True)
class Finding:
    """One place where one rule fires."""

    rule: str
    severity: Severity
    node: str
    what: str
    consequence: str
    fix: str
