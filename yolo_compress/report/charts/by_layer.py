"""Charts with one row per layer or group, in the order of the model: the common part of bar charts and heat maps."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from yolo_compress.report.charts.svg import COLOURS, NARROW_PX, WIDE_PX, blank, style, to_svg

ROW_PX = 18
FONT_PX = 10
ONE_COLUMN = 12  # most rows in one column; a wide chart shows more rows in two columns

Row = TypeVar("Row")
Paint = Callable[[Any, Sequence[Row], float], None]  # axes, rows, width of the axes in px


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names so that numbers count as numbers: `model.2` before `model.10`."""

    def parts(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]

    return sorted(names, key=parts)


def text_px(text: str) -> float:
    """Estimate the width of `text` in px at FONT_PX in DejaVu Sans, which is wider than most fonts of a browser."""
    return 0.62 * FONT_PX * len(text)


def charts(
    name: str,
    description: str,
    rows: Mapping[str, Row],
    paint: Paint[Row],
    *,
    highlighted: Collection[str] = (),
    head: bool = False,
) -> dict[str, str]:
    """Draw the chart in both variants, "wide" and "narrow". Without rows, return an empty dict.

    Args:
        name: Start of the SVG ids, different for each chart.
        description: Text for screen readers.
        rows: Name -> data of the row.
        paint: Draws rows into axes.
        highlighted: Names that are shown in red.
        head: Leave room for one more row at the top.
    """
    if not rows:
        return {}
    return {
        variant: _drawn(f"{name}-{variant}", description, rows, paint, highlighted, ROW_PX * head)
        for variant in ("wide", "narrow")
    }


def _drawn(
    salt: str, description: str, rows: Mapping[str, Row], paint: Paint[Row], highlighted: Collection[str], head_px: int
) -> str:
    wide = salt.endswith("wide")
    names = in_order(rows)
    columns = 2 if wide and len(names) > ONE_COLUMN else 1
    per_column = -(-len(names) // columns)
    figure_px = WIDE_PX if wide else NARROW_PX
    width_px = figure_px / columns - max(map(text_px, names)) - 14
    with style(salt):
        figure = blank(figure_px, ROW_PX * per_column + 16 + head_px)
        for column, axes in enumerate(figure.subplots(1, columns, squeeze=False)[0]):
            part = names[column * per_column : (column + 1) * per_column]
            axes.xaxis.set_visible(False)
            axes.spines["bottom"].set_visible(False)
            axes.set_yticks(range(len(part)), part, fontsize=FONT_PX)
            axes.set_ylim(per_column - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_bounds(-0.5, len(part) - 0.5)
            for name, text in zip(part, axes.get_yticklabels(), strict=True):
                if name in highlighted:
                    text.set(color=COLOURS["bad"], fontweight="bold")
            paint(axes, [rows[name] for name in part], width_px)
        return to_svg(figure, description)
