"""Line charts: precision over recall, and cumulative distribution of latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from yolo_compress.evaluate.ab.schema import AB
from yolo_compress.report.charts.svg import COLOURS, NARROW_PX, WIDE_PX, blank, style, to_svg
from yolo_compress.report.numbers import RUNTIMES, fixed, runtime
from yolo_compress.report.schema import Document, Precision, Row

DASHES: Mapping[Precision, Any] = {"fp32": "solid", "fp16": (0, (5, 2)), "int8": (0, (1, 1.4))}


def precision_over_recall(ab: AB | None) -> dict[str, str]:
    """Draw precision over recall of both models at IoU 0.5, as mean over the classes."""
    if not ab or not ab.get("pr"):
        return {}
    return {name: _precision(ab, name) for name in ("wide", "narrow")}


def _precision(ab: AB, variant: str) -> str:
    wide = variant == "wide"
    with style(f"precision-{variant}"):
        figure = blank(WIDE_PX if wide else NARROW_PX, 340 if wide else 300)
        axes = figure.add_subplot()
        axes.grid(True)
        recall = np.linspace(0, 1, 101)
        for name, map50, curve, colour, width in (
            ("baseline", ab["map50"]["a"], ab["pr"]["a"], "before", 3.2),
            ("compressed", ab["map50"]["b"], ab["pr"]["b"], "after", 1.6),
        ):
            label = f"{name}, mAP50 {fixed(map50)}"
            axes.plot(recall, curve, color=COLOURS[colour], linewidth=width, label=label)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("recall")
        axes.set_ylabel("precision at IoU 0.5")
        axes.legend(loc="lower left", labelcolor=COLOURS["ink"])
        return to_svg(figure, "Precision over recall of both models, mean over the classes")


def every_per_cent(samples_ms: Sequence[float]) -> list[float]:
    """Return the latencies in ms at the quantiles 0, 1, ..., 100 %. They never decrease, despite rounding."""
    found = np.quantile(np.asarray(samples_ms, float), np.linspace(0, 1, 101))
    return [float(value) for value in np.maximum.accumulate(found)]


def time_distribution(document: Document) -> dict[str, str]:
    """Draw the cumulative distribution of latency: one panel per runtime, one line per model and precision."""
    quantiles = document["latency_quantiles"] or {}
    rows = [row for row in document["rows"] if row["id"] in quantiles]
    if not rows:
        return {}
    return {name: _times(rows, quantiles, name) for name in ("wide", "narrow")}


def _times(rows: Sequence[Row], quantiles: Mapping[str, Sequence[float]], variant: str) -> str:
    wide = variant == "wide"
    known = [name for name in (*RUNTIMES, *sorted({row["runtime"] for row in rows} - set(RUNTIMES)))]
    panels = [name for name in known if any(row["runtime"] == name for row in rows)]
    across = min(3, len(panels)) if wide else 1
    down = -(-len(panels) // across)
    with style(f"times-{variant}"):
        figure = blank(WIDE_PX if wide else NARROW_PX, 300 * down if wide else 230 * down)
        grid = figure.subplots(down, across, squeeze=False, sharey=True)
        for place, axes in enumerate(grid.flat):
            if place >= len(panels):
                axes.set_visible(False)
                continue
            _panel(axes, panels[place], [row for row in rows if row["runtime"] == panels[place]], quantiles)
            if place % across == 0:
                axes.set_ylabel("share of calls")
            if place + across >= len(panels):
                axes.set_xlabel("latency, ms")
        return to_svg(figure, "Share of calls that took at most so long, by runtime, model and precision")


def _panel(axes: Any, name: str, rows: Sequence[Row], quantiles: Mapping[str, Sequence[float]]) -> None:
    axes.grid(True)
    axes.set_title(runtime(name), fontsize=12, color=COLOURS["ink"], loc="left", fontweight="bold")
    for row in rows:
        compressed = row["model"] == "compressed"
        axes.plot(
            quantiles[row["id"]],
            np.linspace(0, 1, 101),
            color=COLOURS["after" if compressed else "before"],
            linestyle=DASHES[row["precision"]],
            linewidth=1.8,
        )
    ends = [quantiles[row["id"]] for row in rows]
    low, high = min(values[0] for values in ends), max(values[99] for values in ends)
    axes.set_ylim(0, 1.01)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    if low > 0 and high > 4 * low:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(low / 1.05, high * 1.05)
    else:
        axes.set_xlim(0, high * 1.05)
