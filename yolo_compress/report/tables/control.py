"""Table of the steps from the baseline to the compressed model, with the controls between them."""

from __future__ import annotations

from yolo_compress.report import numbers as n
from yolo_compress.report.controls import CONTROLS
from yolo_compress.report.schema import Control, ControlStep
from yolo_compress.report.tables.grid import Column, Field, Line, Table, cells, columns, field

STEPS = (
    Field(Column("Model", right=False), lambda step: _name(str(step["name"]))),
    field("mAP50-95", "map50_95", n.fixed),
    field("Change", "change", n.signed),
    Field(
        Column("95 % interval", rank=2),
        lambda step: n.interval(step.get("change_low"), step.get("change_high"), n.signed),
    ),
    Field(Column("Due to", right=False), lambda step: str(step["due_to"])),
    field("GFLOPs", "compute_gflops", n.three_digits, rank=1),
    field("Parameters", "parameters", n.millions, rank=3),
    field("Epochs", "epochs", n.integer, rank=4),
    field("mAP50", "map50", n.fixed, rank=5),
)


def control_table(control: Control | None) -> Table:
    """Return a table of the steps. Its notes split the difference between the baseline and the compressed model into the steps."""
    found = control["steps"] if control else []
    lines = [Line(cells(STEPS, {**step, "due_to": " and ".join(step["adds"])})) for step in found]
    notes = [
        "Each model was trained like the compressed one, and has one part of the chain more than the model above it. "
        "Change is the difference from the line above. All are float models in PyTorch."
    ]
    if any("change_low" in step for step in found):
        notes.append("Intervals are by bootstrap over the validation images; one training with one seed each.")
    return Table("Controls", columns(STEPS), tuple(lines), (*notes, *_split(found)))


def _name(name: str) -> str:
    return CONTROLS.get(name, name)


def _split(found: list[ControlStep]) -> tuple[str, ...]:
    """Return a sentence that splits the whole difference into the steps, if all are known."""
    first, last = (n.finite(step["map50_95"]) for step in (found[0], found[-1])) if found else (None, None)
    if first is None or last is None or any(step["change"] is None for step in found[1:]):
        return ()
    parts = ", ".join(f"{n.signed(step['change'])} {' and '.join(step['adds'])}" for step in found[1:])
    return (f"Of {n.signed(last - first)} from the baseline to the compressed model: {parts}.",)
