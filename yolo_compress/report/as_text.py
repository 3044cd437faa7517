"""The report as text, for the terminal and as Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from yolo_compress.report import numbers as n
from yolo_compress.report.bench_rows import place, with_ids
from yolo_compress.report.charts.quantised import quantisation_table, summary
from yolo_compress.report.document import Findings, build
from yolo_compress.report.schema import Document
from yolo_compress.report.tables.ab import errors_table, figures_table, parts_table
from yolo_compress.report.tables.bench import bench_table, device_lines, devices_table, files_table
from yolo_compress.report.tables.cascade import cascade_table
from yolo_compress.report.tables.chain import chain_table, pruning_table
from yolo_compress.report.tables.control import control_table
from yolo_compress.report.tables.grid import Table


def missing_lines(document: Document) -> list[str]:
    """Return a line for each missing measurement, with the reason."""
    return [
        f"{place(entry)} {', '.join(name.upper() for name in entry['precisions'])} "
        f"({', '.join(map(n.model, entry['models']))}): {entry['reason']}"
        for entry in document["missing"]
    ]


def gate_lines(document: Document) -> list[tuple[bool | None, str]]:
    """Return (passed, text) for each check of the gate except mAP. `passed` is None for MLPerf's targets, which are not limits."""
    gate = document["gate"]
    lines: list[tuple[bool | None, str]] = []
    for check in gate["checks"]:
        if check["reason"]:
            text = check["reason"]
        elif check["name"] == "signature":
            text = "classes, input and output are those of the baseline"
        else:
            text = f"{check['name']} {n.three_digits(check['value'])}, limit {n.three_digits(check['limit'])}"
        lines.append((check["passed"], text))
    if gate["tiers"]:
        tiers = [f"{name} % {'reached' if passed else 'not reached'}" for name, passed in gate["tiers"].items()]
        lines.append((None, f"MLPerf's targets, in per cent of the mAP in FP32: {', '.join(tiers)}"))
    return lines


def untested_lines(document: Document) -> list[str]:
    """Return one line for each thing that the run did not test or did not record."""
    lines = list(document["not_tested"])
    if document["not_recorded"]:
        lines.append(f"Not recorded by this run: {', '.join(document['not_recorded'])}.")
    return lines


def render_text(document: Document, width: int = 100) -> str:
    """Return the verdicts and tables for a terminal of `width` columns. A note below a table names the columns left out."""
    parts = [document["verdict"]["line"]]
    if document["ab"]:
        parts[0] += f"\nA/B: {document['ab']['verdict']['line']}"
    tables = _tables(document)
    parts += [text_table(table, width) for table in tables if table.lines]
    missing = missing_lines(document)
    if missing:
        parts.append("\n".join(["Missing", *(f"  {line}" for line in missing)]))
    return "\n\n".join(parts) + "\n"


def _tables(document: Document) -> tuple[Table, ...]:
    """Return the tables that both the terminal and Markdown show first."""
    chain, control = chain_table(document), control_table(document["control"])
    cascades = cascade_table(document.get("cascades", []), document["devices"])
    return chain, control, bench_table(document), files_table(document), devices_table(document), cascades


def text_table(table: Table, width: int) -> str:
    """Return a table as text, with its title. If it is wider than `width` columns, a note names the columns left out."""
    keep = list(range(len(table.columns)))
    sizes = [
        max(len(column.title), *(len(line.cells[i]) for line in table.lines)) for i, column in enumerate(table.columns)
    ]
    while sum(sizes[i] + 2 for i in keep) - 2 > width:
        rank, last = max((table.columns[i].rank, i) for i in keep)
        if rank == 0:
            break
        keep.remove(last)
    rows = [[column.title for column in table.columns], *(list(line.cells) for line in table.lines)]
    texts = [
        "  ".join(row[i].rjust(sizes[i]) if table.columns[i].right else row[i].ljust(sizes[i]) for i in keep).rstrip()
        for row in rows
    ]
    rule = "-" * max(len(text) for text in texts)
    hidden = [column.title for i, column in enumerate(table.columns) if i not in keep]
    note = textwrap.wrap(f"(not shown at this width: {', '.join(hidden)})", width) if hidden else []
    return "\n".join([table.title, texts[0], rule, *texts[1:], *note])


def bench_text(recipe: str, rows: Sequence[Mapping[str, object]], width: int = 120) -> str:
    """Return the bench rows as a table of text with at most `width` columns. The gate has not judged them yet."""
    text = render_text(build(Findings(recipe, with_ids(rows), min_retention=0.0)), width)
    return text[text.index("Bench\n") :]  # the verdict above it is only valid in the report, which knows the limits


def render_markdown(document: Document) -> str:
    """Return the text of `report.md`: all tables with their notes, the lists, and how to reproduce the run."""
    verdict, gate = document["verdict"], document["gate"]
    parts = [f"# {markdown_text(document['recipe'])}", f"**{markdown_text(verdict['line'])}**"]
    bound = n.percent(gate["min_retention"])
    parts.append(
        f"Gate {'passed' if gate['passed'] else 'failed'}: every judged row must have at least {bound} of the baseline's "
        f"mAP50-95 in FP32 (`report.min_retention`); the worst decides."
    )
    if also := gate_lines(document):
        words = {True: "passed: ", False: "failed: ", None: ""}
        parts.append("\n".join(f"- {words[passed]}{markdown_text(what)}" for passed, what in also))
    for table in _tables(document):
        parts += markdown_section(table)
    parts += [f"- {markdown_text(f'{name}: {what}')}" for name, _, what in device_lines(document)]
    ab = document["ab"]
    if ab:
        figures = markdown_section(figures_table(ab))
        parts += [figures[0], f"**{markdown_text(ab['verdict']['line'])}**", *figures[1:]]
        parts += markdown_section(parts_table("By size", ab["by_size"])) + markdown_section(
            parts_table("By class", ab["by_class"])
        )
    parts += markdown_section(errors_table(document["errors"])) + markdown_section(pruning_table(document))
    parts += markdown_section(quantisation_table(document["quantisation"]))
    if document["placement"]:
        parts += ["## Precision", "\n".join(f"- {markdown_text(line)}" for line in summary(document["placement"]))]
    data = document["data"]
    for title, lines in (
        ("Missing", missing_lines(document)),
        ("Not tested", untested_lines(document)),
        ("Data: skipped", data["skipped"]),
        ("Data: notes", data["notes"]),
    ):
        if lines:
            parts += [f"## {title}", "\n".join(f"- {markdown_text(str(line))}" for line in lines)]
    facts = provenance(document)
    if facts:
        parts += [
            "## How to reproduce",
            "\n".join(f"- {markdown_text(key)}: {markdown_text(value)}" for key, value in facts),
        ]
    if document["reproduce"]["recipe_yaml"]:
        yaml = document["reproduce"]["recipe_yaml"].rstrip("\n")
        fence = "`" * max(3, 1 + max((len(run) for run in _backtick_runs(yaml)), default=0))
        parts.append(f"{fence}yaml\n{yaml}\n{fence}")
    return "\n\n".join(parts) + "\n"


def markdown_section(table: Table) -> list[str]:
    """Return the heading, table and notes in Markdown. Empty: the table has no lines."""
    return [f"## {table.title}", _markdown_table(table), *map(markdown_text, table.notes)] if table.lines else []


def provenance(document: Document) -> list[tuple[str, str]]:
    """Return (name, value) pairs that are needed to repeat the run: command, data, image set, environment, fingerprints."""
    data = document["data"]
    facts: list[tuple[str, Any]] = [
        ("command", document["reproduce"]["command"]),
        ("data", data["yaml"]),
        ("validation images", data["val_images"]),
        ("training images", data["train_images"]),
        ("image set", data["image_set"]),
        ("data digest", data["digest"]),
    ]
    facts += [(key, n.one_line(key, value)) for key, value in document["environment"].items()]
    counts = sorted({int(count) for row in document["rows"] if (count := n.finite(row.get("latency_n")))})
    if counts:
        facts.append(("latency runs (n)", ", ".join(map(str, counts))))
    facts += [(f"fingerprint of {stage['stage']}", stage.get("fingerprint")) for stage in document["chain"]]
    return [(key, str(value)) for key, value in facts if value not in (None, "")]


def _markdown_table(table: Table) -> str:
    rows = [
        [column.title for column in table.columns],
        ["---:" if column.right else "---" for column in table.columns],
        *([markdown_text(cell) for cell in line.cells] for line in table.lines),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown_text(text: str) -> str:
    """Escape Markdown and HTML, and join lines, so that a name shows as plain text."""
    flat = re.sub(r"([\\`*\[\]~]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|")):
        flat = flat.replace(char, entity)
    return flat


def _backtick_runs(text: str) -> Sequence[str]:
    return ["".join(run) for char, run in groupby(text) if char == "`"]
