"""Check an ONNX file against all rules and report the findings."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yolo_compress.lint import load
from yolo_compress.lint.compiler import COMPILED
from yolo_compress.lint.equal_scales import SCALES
from yolo_compress.lint.graph import Graph
from yolo_compress.lint.node import DQ, Q
from yolo_compress.lint.operators import OPERATORS
from yolo_compress.lint.placement import PLACEMENT
from yolo_compress.lint.precision import PRECISION
from yolo_compress.lint.qdq_parameters import CODES
from yolo_compress.lint.rule import SEVERITIES, Finding, Rule
from yolo_compress.lint.shapes import SHAPES
from yolo_compress.lint.targets import DEFAULT, Target, target

RULES: dict[str, Rule] = {
    row.id: row for row in (*OPERATORS, *CODES, *SCALES, *PLACEMENT, *SHAPES, *PRECISION, *COMPILED)
}
SHOWN = 8  # findings per rule in the text report; the JSON lists all


@dataclass(frozen=True)
class Report:
    """The findings for an ONNX file that was checked against the rules of a target.

    Attributes:
        file: path of the ONNX file, as the caller passed it.
        target: runtime and versions that the file was checked against.
        facts: name -> opset or node count, see the function `facts`.
        findings: sorted by severity, then by rule, then by position in the graph.
    """

    file: str
    target: Target
    facts: dict[str, int]
    findings: tuple[Finding, ...]

    def count(self, severity: str) -> int:
        """Return the number of findings with the severity `severity`."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def rules(self) -> dict[str, int]:
        """Number of findings for each rule: rule id -> count."""
        return dict(Counter(finding.rule for finding in self.findings))

    def text(self) -> str:
        """Return the report as text. Each rule has its count, consequence and fix, followed by its findings."""
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
        """Return the report as a JSON document with every finding."""
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
    """Check an ONNX file against every rule that applies to a target, and return the report.

    Args:
        file: Any ONNX file. It is only read.
        name: Key of `targets.TARGETS`.

    Raises:
        RecipeError: The target is unknown.
        EnvironmentLacks: There is no such file, or the target needs a library that is not installed.
        StorageError: The file cannot be read.
        CorruptArtifact: The file is not a complete ONNX model, or it refers to weights outside its folder.
    """
    row = target(name)
    graph = load.read(file)
    return Report(str(file), row, facts(graph), findings(graph, row))


def findings(graph: Graph, row: Target) -> tuple[Finding, ...]:
    """Return the findings for a loaded graph, sorted by severity."""
    found = [
        Finding(rule.id, rule.severity, node, what, rule.consequence, rule.fix)
        for rule in RULES.values()
        if row.runtime in rule.runtimes
        for node, what in rule.find(graph, row)
    ]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def facts(graph: Graph) -> dict[str, int]:
    """Return the opset and the numbers of convolutions, INT8 convolutions, Q nodes and DQ nodes, by name."""
    kinds = Counter(node.op_type for node in graph.nodes)
    convs = [node for node in graph.nodes if node.op_type in ("Conv", "ConvTranspose")]
    return {
        "opset": graph.opset,
        "convs": len(convs),
        "int8_convs": sum(graph.is_int8(node) for node in convs),
        "q": kinds[Q],
        "dq": kinds[DQ],
    }
