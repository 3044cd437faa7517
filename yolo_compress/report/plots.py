"""What the stages did: gammas over the epochs, channels before and after.

Each picture comes `wide` (desktop) and `narrow` (phone), because a chart scaled down to 390 px cannot be read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from yolo_compress.report.numbers import percent
from yolo_compress.report.svg import COLOURS, NARROW_PX, WIDE_PX, blank, style, to_svg


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
    with style(f"channels-{variant}"):
        figure = blank(WIDE_PX if variant == "wide" else NARROW_PX, 18 * per_column + 16)
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
        return to_svg(figure, "Output channels of each layer before and after pruning")
