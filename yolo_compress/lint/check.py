"""Run the table of rules over a file, and say what was found."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yolo_compress.lint import load
from yolo_compress.lint.codes import CODES
from yolo_compress.lint.compiler import COMPILED
from yolo_compress.lint.graph import Graph
from yolo_compress.lint.node import DQ, Q
from yolo_compress.lint.operators import OPERATORS
from yolo_compress.lint.placement import PLACEMENT
from yolo_compress.lint.precision import HALVES
from yolo_compress.lint.rule import SEVERITIES, Finding, Rule
from yolo_compress.lint.scales import SCALES
from yolo_compress.lint.shapes import SHAPES
from yolo_compress.lint.targets import DEFAULT, Target, target

RULES: dict[str, Rule] = {row.id: row for row in (*OPERATORS, *CODES, *SCALES, *PLACEMENT, *SHAPES, *HALVES, *COMPILED)}
SHOWN = 8  # lines a rule in the text; the JSON holds all


@dataclass(frozen=True)
class Report:
    """What a file holds and what is wrong with it.

    Attributes:
        file: as given.
        target: name of the target.
        facts: opset and counts of nodes.
        findings: errors first, then in the order of the table and of the graph.
    """

    file: str
    target: Target
    facts: dict[str, int]
    findings: tuple[Finding, ...]

    def count(self, severity: str) -> int:
        """Findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def rules(self) -> dict[str, int]:
        """Findings a rule."""
        return dict(Counter(finding.rule for finding in self.findings))

    def text(self) -> str:
        """Lines for people: a head a rule with count, consequence and fix, then its places."""
        facts = self.facts
        lines = [
            f"{self.file}: opset {facts['opset']}; {facts['convs']} convolutions, {facts['int8_convs']} of them in INT8; "
            f"{facts['q']} Q, {facts['dq']} DQ; for {self.target.about}"
        ]
        for name, count in self.rules.items():
            rule = RULES[name]
            lines += ["", f"{rule.severity} {name} ({count})", f"  {rule.consequence}", f"  fix: {rule.fix}"]
            places = [f"    {finding.node}: {finding.what}" for finding in self.findings if finding.rule == name]
            lines += places[:SHOWN]
            lines += [f"    ... and {count - SHOWN} more, in the JSON"] if count > SHOWN else []
        counts = ", ".join(_counted(self.count(severity), severity) for severity in SEVERITIES)
        return "\n".join([*lines, "", counts])

    def as_json(self) -> dict[str, Any]:
        """The same as one document, with every finding."""
        return {
            "file": self.file,
            "target": self.target.name,
            **self.facts,
            **{severity: self.count(severity) for severity in SEVERITIES},
            "rules": self.rules,
            "findings": [asdict(finding) for finding in self.findings],
        }


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" if word == "info" or count == 1 else f"{count} {word}s"


def check(file: Path, name: str = DEFAULT) -> Report:
    """Look for everything that the table knows.

    Args:
        file: Any ONNX file. Read only.
        name: Key of `targets.TARGETS`.

    Raises:
        RecipeError: Unknown target.
        EnvironmentLacks, StorageError, CorruptArtifact: As `load.read`; or the target is built and its library is not here.
    """
    row = target(name)
    graph = load.read(file)
    return Report(str(file), row, facts(graph), findings(graph, row))


def findings(graph: Graph, row: Target) -> tuple[Finding, ...]:
    """Of a graph in memory."""
    found = [
        Finding(rule.id, rule.severity, node, what, rule.consequence, rule.fix)
        for rule in RULES.values()
        if row.runtime in rule.runtimes
        for node, what in rule.find(graph, row)
    ]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def facts(graph: Graph) -> dict[str, int]:
    """Opset and counts."""
    kinds = Counter(node.op_type for node in graph.nodes)
    convs = [node for node in graph.nodes if node.op_type in ("Conv", "ConvTranspose")]
    return {
        "opset": graph.opset,
        "convs": len(convs),
        "int8_convs": sum(graph.is_int8(node) for node in convs),
        "q": kinds[Q],
        "dq": kinds[DQ],
    }
