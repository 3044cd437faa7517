"""Heat map of the sensitivity to pruning: one row per channel group, one cell per ratio of removed channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from yolo_compress.report.charts.by_layer import FONT_PX, charts, text_px
from yolo_compress.report.charts.svg import COLOURS
from yolo_compress.report.numbers import finite, percent, signed
from yolo_compress.report.schema import Sensitivity
from yolo_compress.report.stage_files import harm

MAX_OPACITY = 0.55  # the figure in the cell stays readable, in the light and in the dark theme


class Cell(NamedTuple):
    text: str
    opacity: float  # opacity of the warning colour


def sensitivity_curves(sensitivity: Sensitivity | None) -> dict[str, str]:
    """Draw the change of loss or mAP relative to the model before pruning. A worse change has more colour.

    The last column, the cap, is the largest fraction of its channels that `prune.max_drop` lets a group lose.
    """
    if not sensitivity:
        return {}
    rows = _rows(sensitivity)
    heads = [percent(ratio, 0) for ratio in sensitivity["ratios"]]
    caps = {group: cap for group, cap in sensitivity["caps"].items() if cap is not None}
    if caps:
        heads.append("cap")
        rows = {group: [*row, Cell(percent(caps[group], 0) if group in caps else "", 0)] for group, row in rows.items()}
    highlighted = {entry["group"] for entry in sensitivity["most_sensitive"]}
    description = "Change of the loss or mAP with each share of the channels of each group removed"
    return charts("sensitivity", description, rows, partial(_paint, heads), highlighted=highlighted, head=True)


def _rows(sensitivity: Sensitivity) -> dict[str, list[Cell]]:
    """Return the cells of each group. Opacity grows with the square root of the harm, so that small harms are visible too."""
    changes: dict[str, list[float | None]] = {}
    for group, values in sensitivity["groups"].items():
        known = map(finite, values)
        changes[group] = [None if value is None else value - sensitivity["dense"] for value in known]
    harms = {
        group: [max(0.0, harm(sensitivity["measure"], change)) for change in row] for group, row in changes.items()
    }
    worst = max((value for row in harms.values() for value in row if math.isfinite(value)), default=0.0) or 1.0
    digits = 3 if worst < 10 else 2
    return {
        group: [
            Cell(signed(change, digits), MAX_OPACITY * math.sqrt(min(value / worst, 1)))
            for change, value in zip(row, harms[group], strict=True)
        ]
        for group, row in changes.items()
    }


def _paint(heads: Sequence[str], axes: Any, rows: Sequence[Sequence[Cell]], width_px: float) -> None:
    longest = max(text_px(cell.text) for row in rows for cell in row)
    size = min(FONT_PX, FONT_PX * width_px / len(heads) / (longest + 4))
    for place, row in enumerate(rows):
        for column, cell in enumerate(row):
            axes.barh(place, 0.96, 0.86, left=column + 0.02, color=(COLOURS["bad"], cell.opacity), linewidth=0)
            axes.text(
                column + 0.5,
                place,
                cell.text,
                fontsize=size,
                ha="center",
                va="center_baseline",
                color=COLOURS["ink"],
            )
    axes.set_xlim(0, len(heads))
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_visible(True)
    axes.xaxis.tick_top()
    axes.set_xticks([column + 0.5 for column in range(len(heads))], heads, fontsize=FONT_PX)
    axes.tick_params(axis="x", length=0)
