"""Forest plot of the mAP differences with their intervals: overall, by size of object and by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from yolo_compress.evaluate.ab.schema import AB, Difference, Part
from yolo_compress.report.charts.svg import COLOURS, NARROW_PX, WIDE_PX, blank, style, to_svg
from yolo_compress.report.numbers import finite, integer, signed

ROW_PX = 22
FONT_PX = 11
MAX_CLASSES = 30  # of more classes, those with the largest losses and gains are drawn


class ForestRow(NamedTuple):
    """A line of the plot: B minus A in mAP50-95, or in mAP50 where the name says so. `bold` marks overall figures."""

    name: str
    truths: int | None
    delta: float | None
    low: float | None
    high: float | None
    bold: bool


def differences(ab: AB | None) -> dict[str, str]:
    """Draw a forest plot of B minus A, with 95 % intervals and the margin of the verdict."""
    if not ab:
        return {}
    lines = _lines(ab)
    return {name: _forest(ab, lines, name) for name in ("wide", "narrow")}


def left_out(ab: AB | None) -> int:
    """Return how many classes the chart leaves out."""
    return max(0, len(_with_truths(ab["by_class"])) - MAX_CLASSES) if ab else 0


def _with_truths(parts: Sequence[Part]) -> list[Part]:
    return [part for part in parts if part["truths"] and finite(part["delta"]) is not None]


def _lines(ab: AB) -> list[ForestRow | None]:
    """Return the lines of the plot. None is a gap."""
    lines: list[ForestRow | None] = [
        ForestRow("mAP50-95", None, *_ends(ab["map50_95"]), True),
        ForestRow("mAP50", None, *_ends(ab["map50"]), True),
    ]
    classes = _with_truths(ab["by_class"])
    if len(classes) > MAX_CLASSES:
        by_delta = sorted(classes, key=lambda part: part["delta"] or 0.0)
        classes = [*by_delta[: MAX_CLASSES // 2], *by_delta[-(MAX_CLASSES // 2) :]]
    for parts in (_with_truths(ab["by_size"]), classes):
        if parts:
            lines.append(None)
        for part in parts:
            lines.append(ForestRow(str(part["name"]), part["truths"], *_ends(part), False))
    return lines


def _ends(part: Difference) -> tuple[float | None, float | None, float | None]:
    return finite(part["delta"]), finite(part["low"]), finite(part["high"])


def _forest(ab: AB, lines: Sequence[ForestRow | None], variant: str) -> str:
    wide = variant == "wide"
    known = [line for line in lines if line]
    values = [value for line in known for value in (line.delta, line.low, line.high) if value is not None]
    margin = ab["settings"]["margin"] * (ab["map50_95"]["a"] or 0.0)
    reach = 1.08 * max([abs(value) for value in values] + [margin, 0.001])
    with style(f"forest-{variant}"):
        figure = blank(WIDE_PX if wide else NARROW_PX, ROW_PX * len(lines) + 62)
        axes = figure.add_subplot()
        axes.axvline(0, color=COLOURS["muted"], linewidth=1)
        if margin:
            axes.axvline(-margin, color=COLOURS["bad"], linewidth=1.2, linestyle=(0, (5, 4)))
        places, names = [], []
        for place, line in enumerate(lines):
            if line is None:
                continue
            places.append(place)
            count = f" ({integer(line.truths)})" if line.truths is not None else ""
            names.append(_short(line.name, 40 if wide else 14) + count)
            _line(axes, place, line, wide)
        axes.set_yticks(places, names, fontsize=FONT_PX)
        for label, line in zip(axes.get_yticklabels(), known, strict=True):
            label.set(color=COLOURS["ink"], fontweight="bold" if line.bold else "normal")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set_xlim(-reach, reach)
        axes.locator_params(axis="x", nbins=7 if wide else 4)
        axes.grid(True, axis="x")
        axes.set_xlabel("compressed minus baseline")
        return to_svg(figure, "Difference of mAP between both models with 95 % intervals, whole, by size and by class")


def _line(axes: Any, place: int, line: ForestRow, wide: bool) -> None:
    worse = line.high is not None and line.high < 0
    colour = COLOURS["bad" if worse else "after"]
    if line.low is not None and line.high is not None:
        axes.plot([line.low, line.high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
    if line.delta is None:
        return
    axes.plot([line.delta], [place], "D" if line.bold else "o", color=colour, markersize=6.5 if line.bold else 5.5)
    text = signed(line.delta)
    if wide and line.low is not None:
        text += f"  [{signed(line.low)}, {signed(line.high)}]"
    axes.annotate(
        text,
        (1, place),
        xycoords=("axes fraction", "data"),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=FONT_PX,
        color=COLOURS["ink"],
        annotation_clip=False,
    )


def _short(name: str, limit: int) -> str:
    flat = " ".join(name.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
