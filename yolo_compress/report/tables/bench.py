"""Tables of the bench rows of this machine and of other machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from yolo_compress.report import numbers as n
from yolo_compress.report.bench_rows import label, place
from yolo_compress.report.schema import Document, Row
from yolo_compress.report.tables.grid import Column, Field, Line, Table, cells, columns, field

HERE = "this machine"
STATE = ("jetpack", "l4t", "nvpmodel", "power_mode", "clocks", "governor")  # facts on a device that decide its speed


MODEL = (
    Field(Column("Model", right=False), lambda row: n.model(str(row["model"]))),
    Field(Column("Precision", right=False), lambda row: str(row["precision"]).upper()),
    field("mAP50-95", "map50_95", n.fixed),
    field("Retention", "retention", n.percent, rank=1),
)
BENCH = (
    Field(Column("Runtime", right=False), place),
    *MODEL,
    field("mAP50", "map50", n.fixed, rank=6),
    field("p50 ms", "latency_p50_ms", n.three_digits),
    field("p90 ms", "latency_p90_ms", n.three_digits, rank=5),
    field("p99 ms", "latency_p99_ms", n.three_digits, rank=7),
    field("Speed-up", "speed_up", n.times, rank=1),
    field("MiB", "size_mib", n.three_digits, rank=2),
    field("Size ratio", "size_ratio", n.times, rank=3),
    field("Ultralytics", "map50_95_ultralytics", n.fixed, rank=8),
    Field(Column("Executed", right=False, rank=4), lambda row: str(row.get("executed") or n.DASH)),
)
FILES = (
    Field(Column("File", right=False), lambda row: f"{row['model']}/{str(row['file']).rpartition('/')[2]}"),
    Field(Column("For", right=False), lambda row: n.runtime(str(row["runtime"]))),
    field("mAP50-95", "map50_95", n.fixed),
    field("Retention", "retention", n.percent, rank=1),
    field("mAP50", "map50", n.fixed, rank=6),
    Field(Column("Executed", right=False, rank=4), lambda row: str(row.get("executed") or n.DASH)),
)
DEVICES = (
    Field(Column("Device", right=False), lambda row: str(row.get("device") or HERE)),
    *MODEL,
    field("p50 ms", "latency_p50_ms", n.three_digits),
    field("p90 ms", "latency_p90_ms", n.three_digits, rank=4),
    field("p99 ms", "latency_p99_ms", n.three_digits, rank=5),
    field("End to end p50 ms", "end_to_end_p50_ms", n.three_digits, rank=2),
    field("Images/s", "fps", n.three_digits, rank=3),
    field("W", "power_w", n.three_digits, rank=2),
    field("mJ", "energy_mj_per_frame", n.three_digits, rank=3),
    field("Memory MiB", "memory_mib", n.integer, rank=4),
    Field(Column("Runtime", right=False), lambda row: n.runtime(str(row["runtime"]))),
)


def bench_table(document: Document) -> Table:
    """Return a table of the rows of this machine, by runtime. All missing rows of a runtime share one line of dashes."""
    marks = _marks(document)
    lines = [
        Line(cells(BENCH, row), place(row), marks.get(row["id"], ""))
        for row in document["rows"]
        if row["status"] == "ok" and not row.get("device")
    ]
    for entry in document["missing"]:
        if entry["device"]:
            continue
        precisions = ", ".join(name.upper() for name in entry["precisions"])
        model = "both" if len(entry["models"]) > 1 else n.model(entry["models"][0])
        dashes = [n.DASH] * (len(BENCH) - 4)
        lines.append(Line((place(entry), model, precisions, *dashes, "missing"), place(entry), "missing"))
    return Table("Bench", columns(BENCH), tuple(lines), _bench_notes(document))


def files_table(document: Document) -> Table:
    """Return a table of the files that no engine on this machine was built from."""
    marks = _marks(document)
    rows = [row for row in document["rows"] if row["status"] == "untimed"]
    lines = [Line(cells(FILES, row), mark=marks.get(row["id"], "")) for row in rows]
    notes = [
        "Simulated: ONNX Runtime computes the graph node by node, without optimisation, from the weights and scales in the file. "
        "An engine may round otherwise inside its fused kernels. There is no latency, since there is no engine."
    ]
    return Table("Files", columns(FILES), tuple(lines), (*notes, *_row_notes(rows)))


def devices_table(document: Document) -> Table:
    """Return a table of the compressed model on this machine and on all devices. Without devices, the table is empty."""
    if not document["devices"]:
        return Table("Devices", columns(DEVICES), ())
    marks = _marks(document)
    rows = [
        row
        for row in document["rows"]
        if row["status"] == "ok" and (row.get("device") or (row["model"] == "compressed" and row["runtime"] != "torch"))
    ]
    lines = [Line(cells(DEVICES, row), row.get("device") or HERE, marks.get(row["id"], "")) for row in rows]
    notes = [
        "Retention is mAP50-95 / mAP50-95 of the baseline in FP32 on this machine. mJ is the energy of one image. "
        "A dash: the device did not measure it."
    ]
    return Table("Devices", columns(DEVICES), tuple(lines), tuple(notes + _row_notes(rows)))


def device_lines(document: Document) -> list[tuple[str, bool, str]]:
    """Return (device, whether its golden self-test passed, description) of every device."""
    lines = []
    for device in document["devices"]:
        golden, about = device["golden"] or {}, device["about"]
        libraries: Mapping[str, object] = device["libraries"] or {str(device["runtime"]): device["library"]}
        parts = [f"{n.runtime(runtime)} {library}" for runtime, library in libraries.items()]
        parts += [f"{key} {n.one_line(key, about[key])}" for key in STATE if about.get(key)]
        parts += [f"power from {device['power_from']}"] if device["power_from"] else []
        parts.append(f"bundle {device['bundle'].get('name')} version {device['bundle'].get('version')}")
        if golden:
            errors = (
                f"boxes within {n.three_digits(golden.get('worst_box_px'))} px, "
                f"scores within {n.three_digits(golden.get('worst_score'))}"
            )
            parts.append(f"golden images {'passed' if golden.get('passed') else 'FAILED'}: {errors}")
        else:
            parts.append("golden images not run")
        lines.append((device["name"], bool(golden.get("passed")), " ".join("; ".join(parts).split())))
    return lines


def _marks(document: Document) -> dict[str, str]:
    gate = document["gate"]
    marks = {entry["id"]: "passed" if entry["passed"] else "failed" for entry in gate["judged"]}
    return {**marks, gate["reference"]: "reference"} if gate["reference"] else marks


def _bench_notes(document: Document) -> tuple[str, ...]:
    notes = [
        "Retention is mAP50-95 / mAP50-95 of the reference row, the baseline in FP32. Speed-up (p50) and size ratio are "
        "relative to the baseline in FP32 on the same runtime. mAP is by pycocotools; the column Ultralytics is mAP50-95 by "
        "its own validator. Executed is the precision that the runtime really computed in."
    ]
    if (batch := document["environment"].get("batch", 1)) != 1:
        notes.append(f"Latency is of one inference of {batch} images.")
    measured = [row for row in document["rows"] if row["status"] == "ok" and not row.get("device")]
    return (*notes, *_row_notes(measured))


def _row_notes(measured: Sequence[Row]) -> list[str]:
    notes = []
    for note in dict.fromkeys(note for row in measured for note in row["notes"]):
        names = [f"{n.model(row['model'])} {label(row)}" for row in measured if note in row["notes"]]
        notes.append(f"{note} ({'all rows' if len(names) == len(measured) else ', '.join(names)}).")
    return notes
