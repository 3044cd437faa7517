"""Types of the ONNX check: a rule, and a finding (one fault at one place in the graph)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from yolo_compress.lint.graph import Graph
from yolo_compress.lint.targets import RUNTIMES, Target

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
Hits = Iterator[tuple[str, str]]  # (name of the node or tensor, description of the fault)
WHOLE = "graph"  # stands in place of a node name if a fault concerns the whole file


@dataclass(frozen=True)
class Rule:
    """A rule that `check` applies to a graph.

    Attributes:
        id: short name that never changes. Users search for it.
        severity: "error": the target refuses the file or computes wrong results; "warning": the model is slower or less
            accurate than necessary; "info": no action is necessary.
        consequence: effect of the fault on the engine.
        fix: how to remove the fault.
        find: yields each place with the fault.
        runtimes: runtimes for which the rule applies.
    """

    id: str
    severity: Severity
    consequence: str
    fix: str
    find: Callable[[Graph, Target], Hits]
    runtimes: tuple[str, ...] = RUNTIMES


@dataclass(frozen=True)
class Finding:
    """One fault at one place.

    Attributes:
        rule: id of the rule.
        node: name of the node or tensor, or WHOLE.
        what: description of this fault, with its values.
    """

    rule: str
    severity: Severity
    node: str
    what: str
    consequence: str
    fix: str
