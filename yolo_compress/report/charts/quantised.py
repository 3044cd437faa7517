"""Charts and table of quantisation: the precision of each tensor, and gain and price of each group in float."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from yolo_compress.report.charts.by_layer import FONT_PX, charts, in_order, text_px
from yolo_compress.report.charts.plots import block_of
from yolo_compress.report.charts.svg import COLOURS
from yolo_compress.report.numbers import fixed, integer, runtime, signed, three_digits
from yolo_compress.report.schema import Quantisation, Tensor
from yolo_compress.report.tables.grid import Column, Line, Table

COST_DIGITS = 3


def price(quantisation: Quantisation) -> tuple[str, Mapping[str, float]]:
    """Return the unit of the price (`qat.sensitivity_price`), and for each group of tensors the price of leaving it in float."""
    gflops = quantisation["price"] == "gflops"
    return ("GFLOPs", quantisation["compute_gflops"]) if gflops else ("ms", quantisation["price_ms"])


def gains_of_groups(quantisation: Quantisation | None) -> dict[str, str]:
    """Draw a bar for each group of tensors: how much mAP rises, or the loss falls, if only this group stays in float.

    The cost of the group in float (ms or GFLOPs) is at the right edge.
    """
    if not quantisation:
        return {}
    gains = quantisation["gives_back"]
    reach = max([abs(gain) for gain in gains.values()]) or 1.0
    digits = 4 if reach < 0.1 else 3
    unit, costs = price(quantisation)
    rows = {group: (gain, fixed(costs[group], COST_DIGITS)) for group, gain in gains.items()}

    def paint(axes: Any, part: Sequence[tuple[float, str]], width_px: float) -> None:
        label_px = text_px(signed(-reach, digits)) + 8
        cost_px = max(text_px(text) for text in (unit, *(cost for _, cost in rows.values())))
        low = min(0.0, *gains.values())
        span = (max(0.0, *gains.values()) - low) / max(0.2, 1 - (2 * label_px + cost_px) / width_px)
        for place, (gain, cost) in enumerate(part):
            axes.barh(place, gain, 0.72, color=COLOURS["bad" if gain > 0 else "before"], linewidth=0)
            axes.annotate(
                signed(gain, digits),
                (max(gain, 0.0), place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=FONT_PX,
                color=COLOURS["ink"],
            )
            right(axes, place, cost)
        right(axes, -1, unit)
        axes.axvline(0, color=COLOURS["muted"], linewidth=0.8)
        axes.set_xlim(low, low + span)

    def right(axes: Any, place: int, text: str) -> None:
        at = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
        axes.text(1, place, text, **at, fontsize=FONT_PX, color=COLOURS["muted"])

    description = "Gain and price of each group of tensors when it alone is in float"
    return charts("quantisation", description, rows, paint, highlighted=set(quantisation["left"]), head=True)


def precisions(placement: Sequence[Tensor]) -> dict[str, str]:
    """Draw a cell for each tensor, filled for INT8 and outlined for float, with one row per block of the model."""
    blocks: dict[str, list[str]] = {}
    for row in placement:
        blocks.setdefault(block_of(row["tensor"]), []).append(row["precision"])
    most = max((len(block) for block in blocks.values()), default=1)

    def paint(axes: Any, part: Sequence[Sequence[str]], width_px: float) -> None:
        for place, cells in enumerate(part):
            for column, precision in enumerate(cells):
                int8 = precision == "int8"
                face, edge = (COLOURS["after"], COLOURS["after"]) if int8 else ("none", COLOURS["before"])
                axes.barh(place, 0.8, 0.62, left=column, facecolor=face, edgecolor=edge, linewidth=1)
        axes.set_xlim(0, max(most, width_px / 18))
        axes.spines["left"].set_visible(False)

    return charts("placement", "Precision of every tensor between two layers, by block", blocks, paint)


def quantisation_table(quantisation: Quantisation | None) -> Table:
    """Return a table of the groups that stay in float and the groups with the largest gain."""
    if not quantisation:
        return Table("INT8 sensitivity", (), ())
    gains, left = quantisation["gives_back"], quantisation["left"]
    unit, costs = price(quantisation)
    columns = (
        Column("Group of tensors", right=False),
        Column("Gain"),
        Column(f"Price, {unit}"),
        Column("Precision", right=False),
    )
    ranked = sorted(gains, key=lambda group: (group not in left, -gains[group]))[: max(5, len(left))]
    lines = [
        Line(
            (
                group,
                signed(gains[group], 4),
                fixed(costs[group], COST_DIGITS),
                "float" if group in left else "INT8",
            )
        )
        for group in ranked
    ]
    return Table("INT8 sensitivity", columns, tuple(lines), (quantisation_note(quantisation),))


def quantisation_note(quantisation: Quantisation) -> str:
    """Return a note on the loss or mAP of three models (float, INT8 and the final mix of both), and on the meaning of the price."""
    what = "Loss" if quantisation["measure"] == "loss" else "mAP50-95"
    left = quantisation["left"]
    unit, costs = price(quantisation)
    ms = f"the ms that its convolutions take longer than in INT8 on {runtime(quantisation['price'])}"
    return (
        f"{what} on {integer(quantisation['images'])} calibration images: {fixed(quantisation['float'], 4)} in float, "
        f"{fixed(quantisation['int8'], 4)} in INT8, {fixed(quantisation['then'], 4)} with "
        f"{', '.join(left) if left else 'no group'} in float; required: {fixed(quantisation['worst'], 4)}. "
        f"The price of a group is {ms if unit == 'ms' else f'the {unit} of its convolutions'}; "
        f"the groups in float cost {three_digits(sum(costs[group] for group in left))} in all."
    )


def summary(placement: Sequence[Tensor]) -> list[str]:
    """Return a line with the number of INT8 tensors and scales, and a line for each reason to stay in float."""
    int8 = [row for row in placement if row["precision"] == "int8"]
    if not placement:
        return []
    lines = [f"{integer(len(int8))} tensors in INT8 with {integer(len({row['group'] for row in int8}))} scales"]
    floats: dict[str, list[str]] = {}
    for row in placement:
        if row["precision"] != "int8":
            why = re.sub(r"^read by \S+ alone$", "each read by one convolution in float", row["why"])
            floats.setdefault(why, []).append(row["tensor"])
    for why, tensors in floats.items():
        shown = ", ".join(in_order(tensors)[:6]) + (", ..." if len(tensors) > 6 else "")
        lines.append(f"{integer(len(tensors))} in float, {why}: {shown}")
    return lines
