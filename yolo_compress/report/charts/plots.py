"""Charts of the stages: gammas over the epochs, channels and FLOPs before and after pruning, mAP during fine-tuning.

Each chart has a `wide` variant (desktop) and a `narrow` one (phone), because a wide chart is unreadable at 390 px.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

from yolo_compress.report.charts.by_layer import FONT_PX, charts, in_order, text_px
from yolo_compress.report.charts.svg import COLOURS, NARROW_PX, WIDE_PX, blank, style, to_svg
from yolo_compress.report.numbers import finite, fixed, percent, three_digits
from yolo_compress.report.schema import Gammas


def gamma_histograms(gammas: Gammas | None) -> dict[str, str]:
    """Draw one histogram per epoch, for at most 9 epochs with the first and the last.

    The fraction of gammas in the first bin is written beside each histogram.
    """
    if not gammas:
        return {}
    return {name: _ridges(gammas, name) for name in ("wide", "narrow")}


def _ridges(gammas: Gammas, variant: str) -> str:
    wide = variant == "wide"
    edges = np.asarray(gammas["edges"], float)
    counts = np.asarray(gammas["epochs"], float)
    shown = np.unique(np.linspace(0, len(counts) - 1, min(9, len(counts))).round().astype(int))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Square root, because thousands of gammas near zero would flatten the other bins.
    height = np.sqrt(share) / max(float(np.sqrt(share).max()), 1e-12)
    step = 34
    with style(f"gammas-{variant}"):
        figure = blank(WIDE_PX if wide else NARROW_PX, int(step * len(shown)) + 120)
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
        return to_svg(figure, "Histograms of the absolute BatchNorm gammas, one for each epoch shown")


def channels_kept(channels: Mapping[str, Sequence[int]] | None) -> dict[str, str]:
    """Draw the channels of each layer: an outlined bar before pruning and a filled one after it."""
    bars = {
        layer: Bar(before, after, f"{before} → {after}" if before != after else f"{before}")
        for layer, (before, after) in (channels or {}).items()
    }
    return _bars("channels", "Output channels of each layer before and after pruning", bars)


def flops_per_layer(flops: Mapping[str, Sequence[int]] | None) -> dict[str, str]:
    """Draw the MACs of each block before and after pruning. The head has one bar per branch."""
    return _macs("flops", "MMACs of each block before and after pruning", _by_block(flops or {}))


def flops_per_convolution(flops: Mapping[str, Sequence[int]] | None) -> dict[str, str]:
    """Draw the MACs of each convolution before and after pruning."""
    return _macs("convolutions", "MMACs of each convolution before and after pruning", flops or {})


def recovery_curve(recovery: Sequence[Sequence[float | None]] | None) -> dict[str, str]:
    """Draw mAP50-95 over the epochs of fine-tuning. With less than two validated epochs, return an empty dict."""
    pairs = [(finite(epoch), finite(value)) for epoch, value in recovery or ()]
    points = [(epoch, value) for epoch, value in pairs if epoch is not None and value is not None]
    return {name: _curve(points, name) for name in ("wide", "narrow")} if len(points) > 1 else {}


def _curve(points: Sequence[tuple[float, float]], variant: str) -> str:
    epochs, values = zip(*points, strict=True)
    with style(f"recovery-{variant}"):
        figure = blank(WIDE_PX if variant == "wide" else NARROW_PX, 240)
        axes = figure.add_subplot()
        axes.grid(True, axis="y")
        axes.plot(epochs, values, color=COLOURS["after"], linewidth=1.8, marker="o", markersize=4.5)
        below = values[1] > values[0]  # put the label where the line does not run
        for place, align, lift in ((0, "left", -15 if below else 8), (-1, "right", 8)):
            axes.annotate(
                fixed(values[place]),
                (epochs[place], values[place]),
                xytext=(0, lift),
                textcoords="offset points",
                ha=align,
                fontsize=11,
                color=COLOURS["ink"],
            )
        axes.margins(x=0.03, y=0.22)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("epoch of fine-tuning")
        axes.set_ylabel("mAP50-95")
        return to_svg(figure, "mAP50-95 over the epochs of fine-tuning after pruning")


class Bar(NamedTuple):
    before: float
    after: float
    label: str


def block_of(layer: str) -> str:
    """Return the block of a layer: `model.2` for `model.2.m.0.cv1.conv`."""
    return ".".join(layer.split(".")[:2])


def _by_block(flops: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    blocks = {layer: block_of(layer) for layer in in_order(flops)}
    head = next(reversed(blocks.values()), "")
    sums: dict[str, tuple[int, int]] = {}
    for layer, block in blocks.items():
        name = ".".join(layer.split(".")[:3]) if block == head else block
        before, after = sums.get(name, (0, 0))
        sums[name] = (before + flops[layer][0], after + flops[layer][1])
    return sums


def _macs(name: str, description: str, flops: Mapping[str, Sequence[int]]) -> dict[str, str]:
    bars = {}
    for layer, (before, after) in flops.items():
        label = three_digits(before / 1e6)
        if after != before:
            label += f" → {three_digits(after / 1e6)} ({percent(after / before, 0)})"
        bars[layer.removesuffix(".conv")] = Bar(before, after, label)
    return _bars(name, description, bars)


def _bars(name: str, description: str, bars: Mapping[str, Bar]) -> dict[str, str]:
    def paint(axes: Any, part: Sequence[Bar], width_px: float) -> None:
        places = np.arange(len(part))
        axes.barh(
            places,
            [bar.before for bar in part],
            height=0.72,
            facecolor="none",
            edgecolor=COLOURS["before"],
            linewidth=1,
        )
        axes.barh(places, [bar.after for bar in part], height=0.72, color=COLOURS["after"])
        for place, bar in zip(places, part, strict=True):
            axes.annotate(
                bar.label,
                (max(bar.before, bar.after), place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=FONT_PX,
                color=COLOURS["ink"],
            )
        fits = (max(bar.before, bar.after) / max(0.2, 1 - (text_px(bar.label) + 8) / width_px) for bar in bars.values())
        axes.set_xlim(0, max(fits) or 1)

    return charts(name, description, bars, paint)
