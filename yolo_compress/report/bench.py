"""Every row measured, here and on other machines, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yolo_compress.report import numbers as n
from yolo_compress.report.gate import label
from yolo_compress.report.grid import Column, Line, Table

Document = Mapping[str, Any]

BENCH = (
    Column("Runtime", right=False),
    Column("Model", right=False),
    Column("Precision", right=False),
    Column("mAP50-95"),
    Column("Kept", rank=1),
    Column("mAP50", rank=6),
    Column("p50 ms"),
    Column("p90 ms", rank=5),
    Column("p99 ms", rank=7),
    Column("Speed-up", rank=1),
    Column("MiB", rank=2),
    Column("Smaller", rank=3),
    Column("Ultralytics", rank=8),
    Column("Executed", right=False, rank=4),
)
DEVICES = (
    Column("Device", right=False),
    Column("Model", right=False),
    Column("Precision", right=False),
    Column("mAP50-95"),
    Column("Kept", rank=1),
    Column("p50 ms"),
    Column("p90 ms", rank=4),
    Column("p99 ms", rank=5),
    Column("End to end p50 ms", rank=2),
    Column("Frames/s", rank=3),
    Column("W", rank=2),
    Column("mJ", rank=3),
    Column("Memory MiB", rank=4),
    Column("Runtime", right=False),
)
HERE = "this machine"
STATE = ("jetpack", "l4t", "nvpmodel", "power_mode", "clocks", "governor")  # of a device, what decides its speed


def bench_table(document: Document) -> Table:
    """Every row measured here, original above compressed within a runtime; what is missing once a runtime, with dashes."""
    marks = _marks(document)
    lines = [
        Line(_bench_cells(row), place(row), marks.get(row["id"], ""))
        for row in document["rows"]
        if row["status"] == "ok" and not row.get("device")
    ]
    for entry in document["missing"]:
        if entry["device"]:
            continue
        precisions = ", ".join(name.upper() for name in entry["precisions"])
        model = "both" if len(entry["models"]) > 1 else entry["models"][0]
        cells = (place(entry), model, precisions, *[n.DASH] * (len(BENCH) - 4), "missing")
        lines.append(Line(cells, place(entry), "missing"))
    return Table("Bench", BENCH, tuple(lines), _bench_notes(document))


def devices_table(document: Document) -> Table:
    """The compressed model here and on every device added; empty where none was."""
    if not document["devices"]:
        return Table("Devices", DEVICES, ())
    marks = _marks(document)
    rows = [
        row
        for row in document["rows"]
        if row["status"] == "ok" and (row.get("device") or (row["model"] == "compressed" and row["runtime"] != "torch"))
    ]
    lines = [Line(_device_cells(row), row.get("device") or HERE, marks.get(row["id"], "")) for row in rows]
    notes = [
        "Kept is against the original in FP32 here. mJ is the energy of one frame; a dash is what a device did not measure."
    ]
    return Table("Devices", DEVICES, tuple(lines), tuple(notes + _row_notes(rows)))


def device_lines(document: Document) -> list[tuple[str, bool, str]]:
    """(device, whether its golden self-test passed, what it is and ran) of every device added."""
    lines = []
    for device in document["devices"]:
        golden, about = device["golden"] or {}, device["about"]
        libraries = device["libraries"] or {device["runtime"]: device["library"]}
        parts = [f"{n.runtime(str(runtime))} {library}" for runtime, library in libraries.items()]
        parts += [f"{key} {n.said(key, about[key])}" for key in STATE if about.get(key)]
        parts += [f"power from {device['power_from']}"] if device["power_from"] else []
        parts.append(f"bundle {device['bundle'].get('name')} version {device['bundle'].get('version')}")
        if golden:
            apart = f"boxes within {n.three(golden.get('worst_box_px'))} px, scores within {n.three(golden.get('worst_score'))}"
            parts.append(f"golden images {'passed' if golden.get('passed') else 'FAILED'}: {apart}")
        else:
            parts.append("golden images not run")
        lines.append((device["name"], bool(golden.get("passed")), " ".join("; ".join(parts).split())))
    return lines


def _marks(document: Document) -> dict[str, str]:
    gate = document["gate"]
    marks = {entry["id"]: "passed" if entry["passed"] else "failed" for entry in gate["judged"]}
    return {**marks, gate["reference"]: "reference"}


def _device_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row.get("device") or HERE,
        row["model"],
        row["precision"].upper(),
        n.fixed(row["map50_95"]),
        n.percent(row["retention"]),
        n.three(row.get("latency_p50_ms")),
        n.three(row.get("latency_p90_ms")),
        n.three(row.get("latency_p99_ms")),
        n.three(row.get("end_to_end_p50_ms")),
        n.three(row.get("fps")),
        n.three(row.get("power_w")),
        n.three(row.get("energy_mj_per_frame")),
        n.whole(row.get("memory_mib")),
        n.runtime(row["runtime"]),
    )


def _bench_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        place(row),
        row["model"],
        row["precision"].upper(),
        n.fixed(row["map50_95"]),
        n.percent(row["retention"]),
        n.fixed(row.get("map50")),
        n.three(row.get("latency_p50_ms")),
        n.three(row.get("latency_p90_ms")),
        n.three(row.get("latency_p99_ms")),
        n.times(row["speed_up"]),
        n.three(row.get("size_mib")),
        n.times(row["size_ratio"]),
        n.fixed(row.get("map50_95_ultralytics")),
        row.get("executed") or n.DASH,
    )


def place(row: Mapping[str, Any]) -> str:
    return n.runtime(row["runtime"]) + (f" ({row['device']})" if row.get("device") else "")


def _bench_notes(document: Document) -> tuple[str, ...]:
    notes = [
        "Kept is mAP50-95 as a share of the original's in FP32 (the reference row); speed-up (p50) and smaller are "
        "against the original in FP32 on the same runtime. mAP by pycocotools; Ultralytics is mAP50-95 as "
        "its own validator has it; executed is what the runtime made of the precision asked for."
    ]
    measured = [row for row in document["rows"] if row["status"] == "ok" and not row.get("device")]
    return (*notes, *_row_notes(measured))


def _row_notes(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    for note in dict.fromkeys(note for row in measured for note in row["notes"]):
        names = [f"{row['model']} {label(row)}" for row in measured if note in row["notes"]]
        notes.append(f"{note} ({'all rows' if len(names) == len(measured) else ', '.join(names)}).")
    return notes
