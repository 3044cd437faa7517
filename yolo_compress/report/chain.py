"""The chain from the baseline to the engines, and what pruning cut, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yolo_compress.report import numbers as n
from yolo_compress.report.grid import Column, Line, Table

Document = Mapping[str, Any]

CHAIN = (
    Column("Stage", right=False),
    Column("mAP50-95"),
    Column("Delta", rank=1),
    Column("95 % interval", rank=5),
    Column("of the delta", rank=4),
    Column("Parameters", rank=2),
    Column("GFLOPs", rank=1),
    Column("MiB", rank=3),
    Column("p50 ms", rank=2),
    Column("p90 ms", rank=6),
    Column("p99 ms", rank=7),
    Column("mAP50", rank=8),
    Column("Epochs", rank=8),
    Column("Time", rank=8),
)
PRUNING = (Column("Figure", right=False), Column("Before"), Column("After"), Column("Kept"))


def chain_table(document: Document) -> Table:
    """baseline -> sparsify -> prune -> distill -> qat, as far as the recipe goes, then the engines made of it here."""
    lines = [
        Line(_cells(stage["stage"], stage), mark="reference" if stage["stage"] == "baseline" else "")
        for stage in document["chain"]
    ]
    engines = [
        row
        for row in document["rows"]
        if row["model"] == "compressed"
        and row["status"] == "ok"
        and row["runtime"] != "torch"
        and not row.get("device")
    ]
    base = next((n.finite(stage.get("map50_95")) for stage in document["chain"] if stage["stage"] == "baseline"), None)
    if lines:
        lines += [
            Line(_cells(f"{n.runtime(row['runtime'])} {row['precision'].upper()}", _against(row, base)))
            for row in engines
        ]
    notes = [
        "Delta is against the baseline. GFLOPs are 2 x GMACs at the stated image size. Latency is that of PyTorch for a stage."
    ]
    if any("map50_95_low" in line for line in (*document["chain"], *engines)):
        notes.append(
            "Intervals are 95 %, by bootstrap over the validation images; that of a delta draws the same images for both."
        )
    notes += [f"{stage['stage']} saw {stage['trained_on']}." for stage in document["chain"] if "trained_on" in stage]
    return Table("Chain", CHAIN, tuple(lines), tuple(notes))


def _against(row: Mapping[str, Any], base: float | None) -> dict[str, Any]:
    value = n.finite(row["map50_95"])
    return {**row, "delta_map50_95": None if value is None or base is None else value - base}


def _cells(name: str, line: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        n.fixed(line.get("map50_95")),
        n.signed(line["delta_map50_95"]),
        n.interval(line.get("map50_95_low"), line.get("map50_95_high"), n.fixed),
        n.interval(line.get("delta_low"), line.get("delta_high"), n.signed),
        n.millions(line.get("parameters")),
        n.three(line.get("compute_gflops")),
        n.three(line.get("size_mib")),
        n.three(line.get("latency_p50_ms")),
        n.three(line.get("latency_p90_ms")),
        n.three(line.get("latency_p99_ms")),
        n.fixed(line.get("map50")),
        n.whole(line.get("epochs")),
        n.duration(line.get("seconds")),
    )


def pruning_table(document: Document) -> Table:
    """What pruning cut, and mAP at each step of the recovery; a figure that the stage did not leave has no line."""
    chain = [stage for stage in document["chain"] if stage["stage"] != "teacher"]
    place = next((i for i, stage in enumerate(chain) if stage["stage"] == "prune"), 0)
    if not place:
        return Table("Pruning", PRUNING, ())
    before, after = chain[place - 1], chain[place]
    lines = []
    if "kept_flops" in after:
        flops = [n.three(stage.get("compute_gflops")) for stage in (before, after)]
        lines.append(Line(("GFLOPs", *flops, n.percent(after["kept_flops"]))))
    steps = {
        "map50_95_after_cut": "after the cut",
        "map50_95_after_bn": "after re-estimating BatchNorm, before any training",
    }
    if after.get("epochs") != 0:
        steps["map50_95"] = f"after fine-tuning, {n.whole(after.get('epochs'))} epochs"
    if "map50_95_after_cut" in after:
        lines += [_map_line(step, before, after[key]) for key, step in steps.items() if key in after]
    if "latency_measured_ms" in after:
        name = (
            f"Latency p50 on {n.runtime(after['latency_runtime'])}, ms (target {n.three(after['latency_target_ms'])})"
        )
        lines.append(Line((name, n.DASH, n.three(after["latency_measured_ms"]), n.DASH)))
    return Table("Pruning", PRUNING, tuple(lines), _pruning_notes(document, before))


def _map_line(step: str, before: Mapping[str, Any], value: Any) -> Line:
    own, now = n.finite(before.get("map50_95")), n.finite(value)
    kept = None if own is None or now is None or own <= 0 else now / own
    return Line((f"mAP50-95 {step}", n.fixed(own), n.fixed(now), n.percent(kept)))


def _pruning_notes(document: Document, before: Mapping[str, Any]) -> tuple[str, ...]:
    notes = [f"Before is the result of {before['stage']}."]
    found = document["sensitivity"]
    if found and found["most_sensitive"]:
        what = "loss" if found["measure"] == "loss" else "mAP50-95"
        most = ", ".join(
            f"{entry['group']} ({'not a number' if entry['mean_change'] is None else n.signed(entry['mean_change'])})"
            for entry in found["most_sensitive"]
        )
        notes.append(f"Most sensitive groups, by the mean change of {what} over the ratios: {most}.")
    return tuple(notes)
