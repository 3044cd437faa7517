"""Bar chart of TIDE's error types of both models."""

from __future__ import annotations

from typing import NamedTuple

from yolo_compress.report.charts.svg import COLOURS, NARROW_PX, WIDE_PX, blank, style, to_svg
from yolo_compress.report.numbers import integer, percent
from yolo_compress.report.schema import ErrorTypes

FONT_PX = 11


def error_costs(errors: ErrorTypes | None) -> dict[str, str]:
    """Draw the cost of each error type in AP50, one bar per model, with the number of errors at the score shown."""
    if not errors:
        return {}
    return {name: _bars(errors, name) for name in ("wide", "narrow")}


class ErrorRow(NamedTuple):
    """An error type: its costs over all detections and its counts at the score shown, as (baseline, compressed model)."""

    name: str
    costs: tuple[float, float]
    counts: tuple[int, int]


def rows(errors: ErrorTypes) -> list[ErrorRow]:
    """Return a row for each error type, in the order of the document."""
    models = (errors["a"], errors["b"], errors["shown_a"], errors["shown_b"])
    return [
        ErrorRow(a["name"], (a["cost"], b["cost"]), (shown_a["count"], shown_b["count"]))
        for a, b, shown_a, shown_b in zip(*(model["types"] for model in models), strict=True)
    ]


def _bars(errors: ErrorTypes, variant: str) -> str:
    wide = variant == "wide"
    lines = rows(errors)
    longest = max(max(line.costs) for line in lines) or 0.01
    with style(f"errors-{variant}"):
        figure = blank(WIDE_PX if wide else NARROW_PX, 40 * len(lines) + 16)
        axes = figure.add_subplot()
        for place, line in enumerate(lines):
            for number, colour in enumerate(("before", "after")):
                y, cost = place + (number - 0.5) * 0.38, line.costs[number]
                axes.barh(
                    y,
                    cost,
                    0.34,
                    color=COLOURS[colour] if number else "none",
                    edgecolor=COLOURS[colour],
                    linewidth=1,
                )
                axes.annotate(
                    f"{percent(cost)}, {integer(line.counts[number])}",
                    (cost, y),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=FONT_PX,
                    color=COLOURS["ink"],
                )
        axes.set_yticks(range(len(lines)), [line.name for line in lines], fontsize=FONT_PX + 1)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_xlim(0, longest * (1.15 if wide else 1.5))
        return to_svg(figure, "What each type of error costs in AP50, baseline and compressed model")
