"""Table of cascades that were added to a report: each model alone, and the cascade."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from yolo_compress.evaluate.cascade.schema import CascadeDocument
from yolo_compress.report import numbers as n
from yolo_compress.report.schema import Device
from yolo_compress.report.tables.grid import Column, Field, Line, Table, cells, columns, field

SIDES = ("small", "large", "static", "cascade")
FIELDS = (
    Field(Column("Model", right=False), lambda side: str(side["name"])),
    field("mAP50-95", "map50_95", n.fixed),
    field("Mean ms", "mean_ms", n.three_digits),
    field("p50 ms", "p50_ms", n.three_digits, rank=1),
    field("p99 ms", "p99_ms", n.three_digits),
    field("Small alone", "kept", n.percent),
)


def cascade_table(cascades: Sequence[CascadeDocument], devices: Sequence[Device] = ()) -> Table:
    """Return a table with the models of each cascade and the cascade itself. Its notes are the verdicts.

    The cascades that robots measured follow. They have no verdict of their own.
    """
    lines = []
    for number, one in enumerate(cascades, 1):
        for side in SIDES:
            figures = cast("dict[str, object] | None", one[side])  # type: ignore[literal-required]
            if figures is not None:
                mark = {"pass": "passed"}.get(one["verdict"]["status"], "failed") if side == "cascade" else ""
                name = side if len(cascades) == 1 else f"{number}: {side}"
                lines.append(Line(cells(FIELDS, {**figures, "name": name}), mark=mark))
    for device in devices:
        for measured in device.get("cascades", []):
            where = f"{device['name']}, {n.runtime(measured['runtime'])}"
            for side in ("small", "large"):
                lines.append(Line(cells(FIELDS, {"mean_ms": measured[f"{side}_ms"], "name": f"{where}: {side}"})))  # type: ignore[literal-required]
            lines.append(Line(cells(FIELDS, {**measured, "name": f"{where}: cascade"})))
    notes = [
        "Latencies are from a decoded image to its detections. Small alone is the share of images that the large model does not see. "
        "The others go through both models, so p99 is about the sum of both."
    ]
    for number, one in enumerate(cascades, 1):
        notes.append(one["verdict"]["line"] if len(cascades) == 1 else f"{number}: {one['verdict']['line']}")
    return Table("Cascades", columns(FIELDS), tuple(lines), tuple(notes))
