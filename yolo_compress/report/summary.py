"""The bench table alone, for a terminal, before there is a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from yolo_compress.report.as_text import render_text
from yolo_compress.report.bench_rows import identified
from yolo_compress.report.document import Findings, build


def bench_text(recipe: str, rows: Sequence[Mapping[str, object]], width: int = 120) -> str:
    """The rows as a table; the gate is judged by `report`, not here."""
    text = render_text(build(Findings(recipe, identified(rows), min_retention=0.0)), width)
    return text[text.index("Bench\n") :]  # the verdict above it belongs to the report
