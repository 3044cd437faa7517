"""Write the report of a study: HTML with the chart of the front, Markdown, JSON, and the recipe of the chosen engine."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.lines import Line2D

from yolo_compress import report
from yolo_compress.files.atomic import atomic_write
from yolo_compress.report import numbers as n
from yolo_compress.report.as_text import markdown_section, markdown_text, text_table
from yolo_compress.report.charts.svg import COLOURS, NARROW_PX, WIDE_PX, blank, style, to_svg
from yolo_compress.search import levels
from yolo_compress.search.document import EngineRow, SearchDocument, chosen_file, document, engines_table, trials_table
from yolo_compress.search.study import Study

BADGES = {"dense": "pass", "reached": "pass", "unproven": "inconclusive", "missed": "fail"}
WIDTH = 120


def write(study: Study) -> SearchDocument:
    """Write report.html, report.md, report.json and NAME-chosen.yaml into the study's folder. Return the document.

    Raises:
        StorageError: The folder cannot be written.
    """
    found = document(study)
    chosen = next((row for row in found["engines"] if row["chosen"]), None)
    recipe = None
    if chosen is not None:
        recipe = (levels.chosen(study.base, chosen["point"], chosen["placement"]) if chosen["trial"] is not None
                  else levels.unpruned(study.base, chosen["placement"])).dump()  # fmt: skip
        atomic_write(chosen_file(study), f"# {' '.join(found['line'].split())}\n{recipe}")
    for kind, content in (
        ("html", render(found, recipe)),
        ("md", markdown(found, recipe)),
        ("json", json.dumps(found, indent=1, allow_nan=False) + "\n"),
    ):
        atomic_write(study.folder / f"report.{kind}", content)
    return found


def text(found: SearchDocument, width: int = WIDTH) -> str:
    """Return the verdict, the counts and the table of the front for a terminal."""
    parts = [found["line"], progress_line(found)]
    if found["engines"]:
        parts.append(text_table(engines_table(found), width))
    return "\n\n".join(parts)


def progress_line(found: SearchDocument) -> str:
    """Return how many trials ended, in which way, and how long that took."""
    counts = found["counts"]
    ended = sum(counts.values()) - counts["open"]
    ways = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"{ended} of {found['planned']} trials ended{f' ({ways})' if ways else ''} in {n.duration(found['spent_s'])}"


def markdown(found: SearchDocument, recipe: str | None) -> str:
    parts = [f"# Search {markdown_text(found['study'])}", f"**{markdown_text(found['line'])}**", progress_line(found)]
    if found["command"]:
        parts.append(f"The command that makes it:\n\n```sh\n{found['command']}\n```")
    parts += markdown_section(engines_table(found)) + markdown_section(trials_table(found))
    parts += ["## Not tested", "\n".join(f"- {markdown_text(line)}" for line in found["not_tested"])]
    if recipe:
        parts.append(f"## Recipe\n\n```yaml\n{recipe.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def render(found: SearchDocument, recipe: str | None) -> str:
    """Return the report as one HTML page in the style of the recipe's report. All text from outside is escaped."""
    styled = (Path(report.__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    match = re.search(r"<style>.*?</style>", styled, re.DOTALL)
    assert match is not None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    status, _, rest = found["line"].partition(": ")
    return environment.get_template("search.html.j2").render(
        document=found,
        style=Markup(match[0]),
        badge=BADGES[found["verdict"]],
        status=status.split()[0],
        rest=rest,
        progress=progress_line(found),
        tables=[table for table in (engines_table(found), trials_table(found)) if table.lines],
        chart={name: Markup(svg) for name, svg in cost_chart(found).items()},
        why=[(row["trial"], row["why"]) for row in found["trials"] if row["why"]],
        recipe=recipe,
        least=n.percent(1 - found["goal"]["max_drop"]),
    )


def cost_chart(found: SearchDocument) -> dict[str, str]:
    """Draw the retention over the cost: all engines, the front with its intervals, and the goal. Without engines: an empty dict."""
    rows = found["engines"]
    return {name: _chart(found, rows, name) for name in ("wide", "narrow")} if rows else {}


def _chart(found: SearchDocument, rows: Sequence[EngineRow], variant: str) -> str:
    wide, goal = variant == "wide", found["goal"]
    with style(f"search-{variant}"):
        figure = blank(WIDE_PX if wide else NARROW_PX, 430 if wide else 400)
        axes = figure.add_subplot()
        axes.grid(True)
        groups = (
            ("muted", "other", [row for row in rows if not row["front"] and row["trial"] is not None]),
            ("before", "baseline", [row for row in rows if row["trial"] is None]),
            ("after", "front", [row for row in rows if row["front"] and row["trial"] is not None]),
        )
        handles = []
        for colour, label, marks in groups:
            if not marks:
                continue
            x, y = [row["cost"] for row in marks], [row["retention"] for row in marks]
            axes.plot(
                x, y, "o", markersize=8 if label == "front" else 5, color=COLOURS[colour], linestyle="none", zorder=3
            )
            handles.append(Line2D([], [], marker="o", linestyle="none", color=COLOURS[colour], label=label))
        for row in rows:
            if row["front"] and row["low"] is not None and row["high"] is not None:
                axes.plot([row["cost"]] * 2, [row["low"], row["high"]], color=COLOURS["after"], linewidth=1, alpha=0.45)
            if row["chosen"]:
                (ring,) = axes.plot(
                    row["cost"], row["retention"], "o", markersize=15, color=COLOURS["after"], label="chosen"
                )
                ring.set_markerfacecolor("none")
                handles.append(ring)
        axes.axhline(1 - goal["max_drop"], color=COLOURS["bad"], linewidth=1.2, linestyle=(0, (5, 4)))
        if goal["limit"] is not None:
            axes.axvline(goal["limit"], color=COLOURS["bad"], linewidth=1.2, linestyle=(0, (5, 4)))
        axes.set_xlabel(f"{'latency p50' if goal['cost'] == 'latency' else 'size'}, {goal['unit']} (lower is better)")
        axes.set_ylabel("retention of mAP50-95")
        figure.legend(handles=handles, loc="outside upper left", ncols=4, labelcolor=COLOURS["ink"])
        return to_svg(figure, "Retention of mAP50-95 over the cost, one mark for each engine, with the goal as lines")
