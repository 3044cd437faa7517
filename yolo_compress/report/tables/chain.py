"""Tables of the chain from the baseline to the engines, and of pruning."""

from __future__ import annotations

from yolo_compress.report import numbers as n
from yolo_compress.report.bench_rows import place
from yolo_compress.report.low_rank import low_rank_note
from yolo_compress.report.schema import ChainStage, Document, Row
from yolo_compress.report.tables.grid import Column, Field, Line, Table, cells, columns, field

CHAIN = (
    Field(Column("Stage", right=False), lambda line: str(line["name"])),
    field("mAP50-95", "map50_95", n.fixed),
    field("Delta", "delta_map50_95", n.signed, rank=1),
    Field(
        Column("95 % interval", rank=5),
        lambda line: n.interval(line.get("map50_95_low"), line.get("map50_95_high"), n.fixed),
    ),
    Field(
        Column("Delta interval", rank=4),
        lambda line: n.interval(line.get("delta_low"), line.get("delta_high"), n.signed),
    ),
    field("Parameters", "parameters", n.millions, rank=2),
    field("GFLOPs", "compute_gflops", n.three_digits, rank=1),
    field("MiB", "size_mib", n.three_digits, rank=3),
    field("p50 ms", "latency_p50_ms", n.three_digits, rank=2),
    field("p90 ms", "latency_p90_ms", n.three_digits, rank=6),
    field("p99 ms", "latency_p99_ms", n.three_digits, rank=7),
    field("mAP50", "map50", n.fixed, rank=8),
    field("Epochs", "epochs", n.integer, rank=8),
    field("Time", "seconds", n.duration, rank=8),
)
PRUNING = (Column("Figure", right=False), Column("Before"), Column("After"), Column("After / before"))


def chain_table(document: Document) -> Table:
    """Return a table with a line for each stage (baseline to qat) and for each engine of the compressed model."""
    lines = [
        Line(cells(CHAIN, {**stage, "name": stage["stage"]}), mark="reference" if stage["stage"] == "baseline" else "")
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
            Line(cells(CHAIN, {**row, "delta_map50_95": _delta(row, base), "name": _engine_name(row)}))
            for row in engines
        ]
    notes = [
        "Delta is the difference from the baseline. GFLOPs are 2 x GMACs of one image. "
        "The latency of a stage is that of its model in PyTorch."
    ]
    if any("map50_95_low" in line for line in (*document["chain"], *engines)):
        notes.append(
            "Intervals are 95 %, by bootstrap over the validation images; for a delta, both models see the same images."
        )
    notes += [
        f"{stage['stage']} trained on {stage['trained_on']}." for stage in document["chain"] if "trained_on" in stage
    ]
    notes += [
        f"{stage['stage']} kept the better of its first and last model on images held back: mAP50-95 "
        f"{n.fixed(stage['held_map50_95_before'])} before, {n.fixed(stage.get('held_map50_95_after'))} after."
        for stage in document["chain"]
        if "held_map50_95_before" in stage
    ]
    return Table("Chain", columns(CHAIN), tuple(lines), tuple(notes))


def _engine_name(row: Row) -> str:
    return f"{place(row)} {row['precision'].upper()}"


def _delta(row: Row, base: float | None) -> float | None:
    value = n.finite(row["map50_95"])
    return None if value is None or base is None else value - base


def pruning_table(document: Document) -> Table:
    """Return a table of GFLOPs, latency and mAP after each step of pruning. Figures that were not measured have no line."""
    chain = [stage for stage in document["chain"] if stage["stage"] != "teacher"]
    place = next((i for i, stage in enumerate(chain) if stage["stage"] == "prune"), 0)
    if not place:
        return Table("Pruning", PRUNING, ())
    before, after = chain[place - 1], chain[place]
    lines = []
    if "kept_flops" in after:
        flops = [n.three_digits(stage.get("compute_gflops")) for stage in (before, after)]
        lines.append(Line(("GFLOPs", *flops, n.percent(after["kept_flops"]))))
    if "bottlenecks" in after:
        counts = [sum(pair[side] for pair in after["bottlenecks"].values()) for side in (0, 1)]
        lines.append(Line(("Bottlenecks", *map(n.integer, counts), n.percent(counts[1] / counts[0]))))
    if "map50_95_after_cut" in after:
        lines.append(_map_line("after the cut", before, after["map50_95_after_cut"]))
        if "map50_95_after_bn" in after:
            step = "after re-estimating BatchNorm, before any training"
            lines.append(_map_line(step, before, after["map50_95_after_bn"]))
        if after.get("epochs") != 0 and "map50_95" in after:
            step = f"after fine-tuning, {n.integer(after.get('epochs'))} epochs"
            lines.append(_map_line(step, before, after["map50_95"]))
    if "latency_measured_ms" in after:
        name = f"Latency p50 on {n.runtime(after['latency_runtime'])}, ms (target {n.three_digits(after['latency_target_ms'])})"
        lines.append(Line((name, n.DASH, n.three_digits(after["latency_measured_ms"]), n.DASH)))
    return Table("Pruning", PRUNING, tuple(lines), _pruning_notes(document, before, after))


def _map_line(step: str, before: ChainStage, value: float | None) -> Line:
    base, now = n.finite(before.get("map50_95")), n.finite(value)
    ratio = None if base is None or now is None or base <= 0 else now / base
    return Line((f"mAP50-95 {step}", n.fixed(base), n.fixed(now), n.percent(ratio)))


def _pruning_notes(document: Document, before: ChainStage, after: ChainStage) -> tuple[str, ...]:
    notes = [f"Before is the result of {before['stage']}."]
    shorter = [f"{layer} {old} → {new}" for layer, (old, new) in after.get("bottlenecks", {}).items() if new < old]
    if shorter:
        notes.append(f"Layers with fewer bottlenecks: {', '.join(shorter)}.")
    if "low_rank" in after:
        notes.append(low_rank_note(after["low_rank"]))
    found = document["sensitivity"]
    if found and found["most_sensitive"]:
        what = "loss" if found["measure"] == "loss" else "mAP50-95"
        most = ", ".join(
            f"{entry['group']} ({'not a number' if entry['mean_change'] is None else n.signed(entry['mean_change'])})"
            for entry in found["most_sensitive"]
        )
        notes.append(f"Most sensitive groups, by the mean change of {what} over the ratios: {most}.")
    return tuple(notes)
