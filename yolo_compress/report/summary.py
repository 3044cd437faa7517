"""The bench table for a terminal, before the report exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from yolo_compress.report.as_text import render_text
from yolo_compress.report.bench_rows import with_ids
from yolo_compress.report.document import Findings, build


def bench_text(recipe: str, rows: Sequence[Mapping[str, object]], width: int = 120) -> str:
    """Return the bench rows as a table of text with at most `width` columns, without a verdict."""
    text = render_text(build(Findings(recipe, with_ids(rows), min_retention=0.0)), width)
    return text[text.index("Bench\n") :]  # the verdict above it is only valid in the report, which knows the limits
