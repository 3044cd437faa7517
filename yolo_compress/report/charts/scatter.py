"""Scatter plot of mAP over latency, with the gate as a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from yolo_compress.report.bench_rows import place
from yolo_compress.report.charts.svg import COLOURS, NARROW_PX, WIDE_PX, blank, style, to_svg
from yolo_compress.report.numbers import MODELS, finite, percent
from yolo_compress.report.schema import Document, Model, Precision, Reference, Row

SHADES: dict[Model | Literal["reference"], str] = {"original": "before", "compressed": "after", "reference": "muted"}
MARKERS: dict[Precision, str] = {"fp32": "o", "fp16": "s", "int8": "^"}


class Point(NamedTuple):
    """A mark of the chart. `recipe` is empty, except for the reference of another recipe."""

    model: Model | Literal["reference"]
    place: str  # its runtime, and the GPU of torch
    precision: Precision
    latency_ms: float
    map50_95: float
    interval: tuple[float, float] | None
    recipe: str = ""


def accuracy_over_latency(document: Document) -> dict[str, str]:
    """Draw mAP50-95 over p50 latency on this machine, one mark per row or reference. Without marks, return an empty dict."""
    here = [row for row in document["rows"] if row["status"] == "ok" and not row.get("device")]
    known = [
        *(_point(row, row["model"]) for row in here),
        *(_point(row, "reference") for row in document["references"]),
    ]
    points = [point for point in known if point]
    if not points:
        return {}
    return {name: _scatter(document, points, name) for name in ("wide", "narrow")}


def _point(row: Row | Reference, model: Model | Literal["reference"]) -> Point | None:
    """Return the mark of a row, or None if its mAP or latency is unknown."""
    latency_ms, map50_95 = finite(row.get("latency_p50_ms")), finite(row["map50_95"])
    if map50_95 is None or latency_ms is None or latency_ms <= 0:
        return None
    low, high = finite(row.get("map50_95_low")), finite(row.get("map50_95_high"))
    interval = None if low is None or high is None else (low, high)
    recipe = str(row.get("name", ""))
    return Point(model, place(row), row["precision"], latency_ms, map50_95, interval, recipe)


def _scatter(document: Document, points: Sequence[Point], variant: str) -> str:
    wide = variant == "wide"
    with style(f"scatter-{variant}"):
        figure = blank(WIDE_PX if wide else NARROW_PX, 430 if wide else 400)
        axes = figure.add_subplot()
        axes.grid(True)
        marks = []
        for point in points:
            x, y = point.latency_ms, point.map50_95
            colour = COLOURS[SHADES[point.model]]
            axes.plot(
                [x],
                [y],
                MARKERS[point.precision],
                markersize=9,
                color=colour,
                linestyle="none",
                zorder=3,
                markerfacecolor=COLOURS["paper"] if point.model == "original" else colour,
                markeredgewidth=1.8,
            )
            if point.interval:
                axes.plot([x, x], point.interval, color=colour, linewidth=1, alpha=0.45, zorder=1.5)
            name = point.place
            if point.model == "reference":
                name = f"{point.recipe}, {name}"
            marks.append((x, y, f"{name} {point.precision.upper()}" if wide else name, colour))
        _scales(axes, points)
        _gate_line(axes, document)
        axes.set_xlabel("latency p50, ms (lower is better)")
        axes.set_ylabel("mAP50-95")
        figure.legend(
            handles=_legend(points),
            loc="outside upper left",
            ncols=5 if wide else 3,
            handletextpad=0.3,
            columnspacing=1.2,
            borderaxespad=0.2,
            labelcolor=COLOURS["ink"],
        )
        _place_labels(figure, axes, marks, 11 if wide else 10)
        return to_svg(figure, "mAP50-95 over latency, one mark for each model, runtime and precision")


def _scales(axes: Any, points: Sequence[Point]) -> None:
    """Set the axes.

    The latency axis is logarithmic if the slowest mark is over four times the fastest. The mAP axis shows only the range of the
    marks.
    """
    xs = np.array([point.latency_ms for point in points])
    ys = np.array([end for point in points for end in (point.map50_95, *(point.interval or ()))])
    pad = max(0.01, 0.08 * float(np.ptp(ys)))
    axes.set_ylim(ys.min() - pad, ys.max() + pad)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    if xs.max() > 4 * xs.min():
        axes.set_xscale("log")
        axes.set_xlim(xs.min() / 1.25, xs.max() * 1.6)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if xs.max() > 40 * xs.min() else (1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, xs.max() * 1.25)
    axes.xaxis.set_major_formatter(plain)


def _gate_line(axes: Any, document: Document) -> None:
    gate = document["gate"]
    reference = next((row for row in document["rows"] if row["id"] == gate["reference"]), None)
    base = finite(reference["map50_95"]) if reference else None
    if base is None:
        return
    bound = base * gate["min_retention"]
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, bound - 0.01), max(high, bound + 0.01))
    axes.axhline(bound, color=COLOURS["bad"], linewidth=1.2, linestyle=(0, (5, 4)), zorder=2)
    axes.annotate(
        f"gate {percent(gate['min_retention'])}",
        (1, bound),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -4),
        textcoords="offset points",
        va="top",
        ha="right",
        color=COLOURS["bad"],
        fontsize=11,
    )


def _legend(points: Sequence[Point]) -> list[Line2D]:
    handles = []
    for model, colour in SHADES.items():
        if any(point.model == model for point in points):
            face = COLOURS["paper"] if model == "original" else COLOURS[colour]
            handles.append(
                Line2D(
                    [],
                    [],
                    marker="o",
                    linestyle="none",
                    color=COLOURS[colour],
                    label=MODELS.get(model, model),
                    markerfacecolor=face,
                    markersize=8,
                    markeredgewidth=1.8,
                )
            )
    for precision, marker in MARKERS.items():
        if any(point.precision == precision for point in points):
            handles.append(
                Line2D(
                    [],
                    [],
                    marker=marker,
                    linestyle="none",
                    color=COLOURS["muted"],
                    markersize=8,
                    label=precision.upper(),
                )
            )
    return handles


def _place_labels(figure: Figure, axes: Any, marks: Sequence[tuple[float, float, str, str]], size: int) -> None:
    """Put each label at the nearest free place around its mark, so that it covers no mark, label or edge."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")  # keep the layout that is measured here
    renderer = canvas.get_renderer()
    centres = axes.transData.transform([(x, y) for x, y, _, _ in marks])
    occupied = [Bbox.from_bounds(cx - 7, cy - 7, 14, 14) for cx, cy in centres]
    occupied += [text.get_window_extent(renderer) for text in axes.texts]
    frame = axes.get_window_extent(renderer)
    for (cx, cy), (x, y, name, colour) in sorted(zip(centres, marks, strict=True), key=lambda m: (m[0][0], m[0][1])):
        text = axes.text(x, y, name, fontsize=size, color=COLOURS["ink"], ha="left", va="center")
        extent = text.get_window_extent(renderer)
        text.remove()
        best: tuple[float, float, float] | None = None
        for reach in (11.0, 18.0, 28.0, 40.0, 54.0, 70.0):
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8)):
                left = cx + reach * dx + (0 if dx > 0 else -extent.width if dx < 0 else -extent.width / 2)
                box = Bbox.from_bounds(left, cy + reach * dy - extent.height / 2, extent.width, extent.height)
                inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
                if inside and not any(box.overlaps(other) for other in occupied):
                    best = (left, cy + reach * dy, reach)
                    break
            if best:
                break
        left, middle, reach = best or (cx + 11, cy, 11.0)
        occupied.append(Bbox.from_bounds(left, middle - extent.height / 2, extent.width, extent.height))
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkB": 6, "shrinkA": 1}
        axes.annotate(
            name,
            (x, y),
            xytext=(left - cx, middle - cy),
            textcoords="offset pixels",
            fontsize=size,
            ha="left",
            va="center",
            color=COLOURS["ink"],
            arrowprops=leader if reach > 18 else None,
        )
