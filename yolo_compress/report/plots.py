"""Pictures as inline SVG: text stays text, colours are the page's CSS variables, the same input gives the same bytes.

Each picture comes `wide` (desktop) and `narrow` (phone), because a chart scaled down to 390 px cannot be read.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from yolo_compress.report.numbers import finite, percent, runtime

# Stand-ins that matplotlib can draw with; in the SVG each becomes a variable that the page sets for light and dark.
COLOURS = {
    "ink": "#0a0b0c",
    "muted": "#1a1b1c",
    "line": "#2a2b2c",
    "paper": "#3a3b3c",
    "before": "#4a4b4c",
    "after": "#5a5b5c",
    "bad": "#6a6b6c",
}
MARKERS = {"fp32": "o", "fp16": "s", "int8": "^"}
WIDE_PX, NARROW_PX = 1000, 360


@contextmanager
def _style(salt: str) -> Iterator[None]:
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": ["DejaVu Sans"],
        "font.size": 12,
        "text.parse_math": False,
        "text.color": COLOURS["ink"],
        "axes.edgecolor": COLOURS["line"],
        "axes.labelcolor": COLOURS["muted"],
        "xtick.color": COLOURS["line"],
        "ytick.color": COLOURS["line"],
        "xtick.labelcolor": COLOURS["muted"],
        "ytick.labelcolor": COLOURS["muted"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": COLOURS["line"],
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "hatch.linewidth": 0.6,
    }
    with matplotlib.rc_context(settings):
        yield


def _figure(width_px: int, height_px: int) -> Figure:
    figure = Figure(figsize=(width_px / 72, height_px / 72), dpi=72, layout="constrained")
    figure.patch.set_alpha(0)
    return figure


def _svg(figure: Figure, description: str) -> str:
    """The bare <svg> element: no prolog, metadata, date or address, sized by the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    body = body.replace("font: ", "font: inherit; font-size: ") if False else body
    return f'<svg {box[0]} role="img" aria-label="{description}">{body.strip()}'


def accuracy_over_latency(document: Mapping[str, Any]) -> dict[str, str]:
    """mAP50-95 over p50 latency, one mark a row; empty where nothing has both figures."""
    points = [
        row
        for row in document["rows"]
        if row["status"] == "ok"
        and finite(row["map50_95"]) is not None
        and (finite(row.get("latency_p50_ms")) or 0) > 0
    ]
    if not points:
        return {}
    return {name: _scatter(document, points, name) for name in ("wide", "narrow")}


def _scatter(document: Mapping[str, Any], points: Sequence[Mapping[str, Any]], variant: str) -> str:
    wide = variant == "wide"
    with _style(f"scatter-{variant}"):
        figure = _figure(WIDE_PX if wide else NARROW_PX, 430 if wide else 400)
        axes = figure.add_subplot()
        axes.grid(True)
        marks = []
        for row in points:
            x, y, compressed = row["latency_p50_ms"], row["map50_95"], row["model"] == "compressed"
            colour = COLOURS["after" if compressed else "before"]
            axes.plot(
                [x],
                [y],
                MARKERS[row["precision"]],
                markersize=9,
                color=colour,
                linestyle="none",
                zorder=3,
                markerfacecolor=colour if compressed else COLOURS["paper"],
                markeredgewidth=1.8,
            )
            name = runtime(row["runtime"])
            marks.append((x, y, f"{name} {row['precision'].upper()}" if wide else name, colour))
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
        return _svg(figure, "mAP50-95 over latency, one mark for each model, runtime and precision")


def _scales(axes: Any, points: Sequence[Mapping[str, Any]]) -> None:
    """Logarithmic time where the slowest takes more than four times the fastest; mAP zoomed to its range."""
    xs = np.array([row["latency_p50_ms"] for row in points])
    ys = np.array([row["map50_95"] for row in points])
    pad = max(0.01, 0.18 * float(np.ptp(ys)))
    axes.set_ylim(ys.min() - pad, ys.max() + pad)
    axes.yaxis.set_major_locator(MaxNLocator(6))
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


def _gate_line(axes: Any, document: Mapping[str, Any]) -> None:
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


def _legend(points: Sequence[Mapping[str, Any]]) -> list[Line2D]:
    handles = []
    for model, colour in (("original", "before"), ("compressed", "after")):
        if any(row["model"] == model for row in points):
            face = COLOURS["paper"] if model == "original" else COLOURS[colour]
            handles.append(
                Line2D(
                    [],
                    [],
                    marker="o",
                    linestyle="none",
                    color=COLOURS[colour],
                    label=model,
                    markerfacecolor=face,
                    markersize=8,
                    markeredgewidth=1.8,
                )
            )
    for precision, marker in MARKERS.items():
        if any(row["precision"] == precision for row in points):
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
    """Greedy: each label takes the nearest spot around its mark that covers no mark, no label and no edge."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")  # what is measured here is what gets saved
    renderer = canvas.get_renderer()
    centres = axes.transData.transform([(x, y) for x, y, _, _ in marks])
    taken = [Bbox.from_bounds(cx - 7, cy - 7, 14, 14) for cx, cy in centres]
    taken += [text.get_window_extent(renderer) for text in axes.texts]
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
                if inside and not any(box.overlaps(other) for other in taken):
                    best = (left, cy + reach * dy, reach)
                    break
            if best:
                break
        left, middle, reach = best or (cx + 11, cy, 11.0)
        taken.append(Bbox.from_bounds(left, middle - extent.height / 2, extent.width, extent.height))
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


def gamma_histograms(gammas: Mapping[str, Any] | None) -> dict[str, str]:
    """One ridge an epoch (at most 9, first and last always), with the share of gammas in the first bin beside it."""
    if not gammas:
        return {}
    return {name: _ridges(gammas, name) for name in ("wide", "narrow")}


def _ridges(gammas: Mapping[str, Any], variant: str) -> str:
    wide = variant == "wide"
    edges = np.asarray(gammas["edges"], float)
    counts = np.asarray(gammas["epochs"], float)
    shown = np.unique(np.linspace(0, len(counts) - 1, min(9, len(counts))).round().astype(int))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Square root: with thousands of gammas near zero, the shape of the rest would be a flat line.
    height = np.sqrt(share) / max(float(np.sqrt(share).max()), 1e-12)
    step = 34
    with _style(f"gammas-{variant}"):
        figure = _figure(WIDE_PX if wide else NARROW_PX, int(step * len(shown)) + 120)
        axes = figure.add_subplot()
        for line, epoch in enumerate(shown):
            base = len(shown) - 1 - line
            tops = base + 1.5 * height[epoch]
            last = epoch == shown[-1]
            axes.stairs(tops, edges, baseline=base, fill=True, color=COLOURS["paper"], zorder=2 * line)
            axes.stairs(
                tops,
                edges,
                baseline=base,
                fill=True,
                color=COLOURS["after" if last else "before"],
                alpha=0.75 if last else 0.35,
                linewidth=0,
                zorder=2 * line + 0.5,
            )
            axes.stairs(
                tops,
                edges,
                baseline=base,
                color=COLOURS["after" if last else "before"],
                linewidth=1.2,
                zorder=2 * line + 1,
            )
            axes.annotate(
                percent(share[epoch][0]),
                (1, base),
                xycoords=("axes fraction", "data"),
                xytext=(6, 3),
                textcoords="offset points",
                fontsize=11,
                color=COLOURS["ink"],
                annotation_clip=False,
            )
        axes.annotate(
            f"below {edges[1]:.3g}",
            (1, len(shown) - 0.15),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            fontsize=11,
            color=COLOURS["muted"],
        )
        axes.set_yticks(range(len(shown)), [f"epoch {epoch + 1}" for epoch in shown[::-1]])
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(-0.05, len(shown) + 0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("|gamma| (height: square root of the share)")
        return _svg(figure, "Histograms of the absolute BatchNorm gammas, one for each epoch shown")


def channels_kept(channels: Mapping[str, Sequence[int]] | None) -> dict[str, str]:
    """A bar a layer, before as outline, after filled, in the network's order."""
    if not channels:
        return {}
    layers = [(layer, channels[layer][0], channels[layer][1]) for layer in sorted(channels, key=_natural)]
    return {name: _bars(layers, name) for name in ("wide", "narrow")}


def _natural(name: str) -> list[tuple[int, str]]:
    """`model.2` before `model.10`, whatever order the JSON came in."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _bars(layers: Sequence[tuple[str, int, int]], variant: str) -> str:
    columns = 2 if variant == "wide" and len(layers) > 12 else 1
    per_column = -(-len(layers) // columns)
    longest = max(max(before, after) for _, before, after in layers)
    with _style(f"channels-{variant}"):
        figure = _figure(WIDE_PX if variant == "wide" else NARROW_PX, 18 * per_column + 16)
        panels = figure.subplots(1, columns, squeeze=False)[0]
        for index, axes in enumerate(panels):
            part = layers[index * per_column : (index + 1) * per_column]
            places = np.arange(len(part))
            axes.barh(
                places,
                [before for _, before, _ in part],
                height=0.72,
                facecolor="none",
                edgecolor=COLOURS["before"],
                linewidth=1,
            )
            axes.barh(places, [after for _, _, after in part], height=0.72, color=COLOURS["after"])
            for place, (_, before, after) in zip(places, part, strict=True):
                axes.annotate(
                    f"{before} → {after}" if before != after else f"{before}",
                    (max(before, after), place),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=10,
                    color=COLOURS["ink"],
                )
            axes.set_yticks(places, [name for name, _, _ in part], fontsize=10)
            axes.set_ylim(per_column - 0.4, -0.6)
            axes.set_xlim(0, longest * 1.28)
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_visible(False)
            axes.spines["bottom"].set_visible(False)
        return _svg(figure, "Output channels of each layer before and after pruning")
