"""The chain, the bench and pruning as tables: the same cells in the terminal, in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from yolo_compress.report import numbers as n
from yolo_compress.report.gate import label

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """`rank` says what goes first where the terminal is narrow (the highest); 0 always stays."""

    title: str
    right: bool = True
    rank: int = 0


@dataclass(frozen=True)
class Line:
    """`group` is the runtime of a bench row; `mark` is what deserves the eye: reference, passed, failed, missing."""

    cells: tuple[str, ...]
    group: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    def groups(self) -> list[tuple[str, list[Line]]]:
        """Lines that stand under one row heading."""
        return [(group, list(lines)) for group, lines in groupby(self.lines, lambda line: line.group)]


CHAIN = (
    Column("Stage", right=False),
    Column("Parameters", rank=2),
    Column("GFLOPs", rank=1),
    Column("MiB", rank=3),
    Column("mAP50-95"),
    Column("Delta", rank=1),
    Column("mAP50", rank=4),
    Column("Epochs", rank=5),
    Column("Time", rank=5),
    Column("State", right=False, rank=6),
)
BENCH = (
    Column("Runtime", right=False),
    Column("Model", right=False),
    Column("Precision", right=False),
    Column("Executed", right=False, rank=4),
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
)
PRUNING = (Column("Figure", right=False), Column("Before"), Column("After"), Column("Kept"))


def chain_table(document: Document) -> Table:
    """baseline -> sparsify -> prune -> distill -> qat, as far as the recipe goes."""
    lines = []
    for stage in document["chain"]:
        cells = (
            stage["stage"],
            n.millions(stage.get("parameters")),
            n.three(stage.get("compute_gflops")),
            n.three(stage.get("size_mib")),
            n.fixed(stage.get("map50_95")),
            n.signed(stage["delta_map50_95"]),
            n.fixed(stage.get("map50")),
            n.whole(stage.get("epochs")),
            n.duration(stage.get("seconds")),
            stage.get("status") or n.DASH,
        )
        lines.append(Line(cells, mark="reference" if stage["stage"] == "baseline" else ""))
    notes = ["Delta is against the baseline. GFLOPs are 2 x GMACs at the stated image size."]
    notes += [f"{stage['stage']} saw {stage['trained_on']}." for stage in document["chain"] if "trained_on" in stage]
    return Table("Chain", CHAIN, tuple(lines), tuple(notes))


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


def bench_table(document: Document) -> Table:
    """Every row measured, original above compressed within a runtime; what is missing once a runtime, with dashes."""
    gate = document["gate"]
    marks = {entry["id"]: "passed" if entry["passed"] else "failed" for entry in gate["judged"]}
    marks[gate["reference"]] = "reference"
    lines = [
        Line(_bench_cells(row), _place(row), marks.get(row["id"], ""))
        for row in document["rows"]
        if row["status"] == "ok"
    ]
    for entry in document["missing"]:
        precisions = ", ".join(name.upper() for name in entry["precisions"])
        model = "both" if len(entry["models"]) > 1 else entry["models"][0]
        cells = (_place(entry), model, precisions, "missing", *[n.DASH] * (len(BENCH) - 4))
        lines.append(Line(cells, _place(entry), "missing"))
    return Table("Bench", BENCH, tuple(lines), _bench_notes(document))


def _bench_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        _place(row),
        row["model"],
        row["precision"].upper(),
        row.get("executed") or n.DASH,
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
    )


def _place(row: Mapping[str, Any]) -> str:
    return n.runtime(row["runtime"]) + (f" ({row['device']})" if row.get("device") else "")


def _bench_notes(document: Document) -> tuple[str, ...]:
    notes = [
        "Kept is mAP50-95 as a share of the original's in FP32 (the reference row); speed-up (p50) and smaller are "
        "against the original in FP32 on the same runtime. mAP by pycocotools; the last column is mAP50-95 as "
        "Ultralytics' own validator has it."
    ]
    measured = [row for row in document["rows"] if row["status"] == "ok"]
    for note in dict.fromkeys(note for row in measured for note in row["notes"]):
        names = [f"{row['model']} {label(row)}" for row in measured if note in row["notes"]]
        notes.append(f"{note} ({'all rows' if len(names) == len(measured) else ', '.join(names)}).")
    return tuple(notes)


def missing_lines(document: Document) -> list[str]:
    """What was asked for and not measured, with what would mend it."""
    return [
        f"{_place(entry)} {', '.join(name.upper() for name in entry['precisions'])} "
        f"({', '.join(entry['models'])}): {entry['reason']}"
        for entry in document["missing"]
    ]


def untested_lines(document: Document) -> list[str]:
    """What the reader should not assume."""
    lines = list(document["not_tested"])
    if document["not_recorded"]:
        lines.append(f"Not recorded by this run: {', '.join(document['not_recorded'])}.")
    return lines


def render_text(document: Document, width: int = 100) -> str:
    """The verdict and both tables for a terminal of `width` columns; columns that do not fit are named below."""
    parts = [document["verdict"]["line"]]
    parts += [_text_table(table, width) for table in (chain_table(document), bench_table(document)) if table.lines]
    missing = missing_lines(document)
    if missing:
        parts.append("\n".join(["Missing", *(f"  {line}" for line in missing)]))
    return "\n\n".join(parts) + "\n"


def _text_table(table: Table, width: int) -> str:
    keep = list(range(len(table.columns)))
    sizes = [
        max(len(column.title), *(len(line.cells[i]) for line in table.lines)) for i, column in enumerate(table.columns)
    ]
    while sum(sizes[i] + 2 for i in keep) - 2 > width:
        rank, last = max((table.columns[i].rank, i) for i in keep)
        if rank == 0:
            break
        keep.remove(last)
    rows = [[column.title for column in table.columns], *(list(line.cells) for line in table.lines)]
    texts = [
        "  ".join(row[i].rjust(sizes[i]) if table.columns[i].right else row[i].ljust(sizes[i]) for i in keep).rstrip()
        for row in rows
    ]
    rule = "-" * max(len(text) for text in texts)
    hidden = [column.title for i, column in enumerate(table.columns) if i not in keep]
    note = [f"(not shown at this width: {', '.join(hidden)})"] if hidden else []
    return "\n".join([table.title, texts[0], rule, *texts[1:], *note])


def render_markdown(document: Document) -> str:
    """report.md: what the terminal shows, whole, with notes, findings and provenance."""
    verdict, gate = document["verdict"], document["gate"]
    parts = [f"# {_escape(document['recipe'])}", f"**{_escape(verdict['line'])}**"]
    bound = n.percent(gate["min_retention"])
    parts.append(
        f"Gate: every judged row keeps at least {bound} of the original's mAP50-95 "
        f"(`report.min_retention`): {'passed' if gate['passed'] else 'failed'}."
    )
    for table in (chain_table(document), bench_table(document), pruning_table(document)):
        if table.lines:
            parts += [f"## {table.title}", _markdown_table(table), *map(_escape, table.notes)]
    data = document["data"]
    for title, lines in (
        ("Missing", missing_lines(document)),
        ("Not tested", untested_lines(document)),
        ("Data: skipped", data["skipped"]),
        ("Data: notes", data["notes"]),
    ):
        if lines:
            parts += [f"## {title}", "\n".join(f"- {_escape(str(line))}" for line in lines)]
    facts = provenance(document)
    if facts:
        parts += ["## How to reproduce", "\n".join(f"- {_escape(key)}: {_escape(value)}" for key, value in facts)]
    if document["reproduce"]["recipe_yaml"]:
        yaml = document["reproduce"]["recipe_yaml"].rstrip("\n")
        fence = "`" * max(3, 1 + max((len(run) for run in _backtick_runs(yaml)), default=0))
        parts.append(f"{fence}yaml\n{yaml}\n{fence}")
    return "\n\n".join(parts) + "\n"


def provenance(document: Document) -> list[tuple[str, str]]:
    """Everything that a repetition needs, flat: command, data, image set, environment, fingerprints."""
    data = document["data"]
    facts: list[tuple[str, Any]] = [
        ("command", document["reproduce"]["command"]),
        ("data", data["yaml"]),
        ("validation images", data["val_images"]),
        ("training images", data["train_images"]),
        ("image set", data["image_set"]),
        ("data digest", data["digest"]),
    ]
    facts += _flat(document["environment"])
    counts = sorted({row["latency_n"] for row in document["rows"] if row.get("latency_n")})
    if counts:
        facts.append(("latency runs (n)", ", ".join(map(str, counts))))
    facts += [(f"fingerprint of {stage['stage']}", stage.get("fingerprint")) for stage in document["chain"]]
    return [(key, str(value)) for key, value in facts if value not in (None, "")]


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    facts: list[tuple[str, Any]] = []
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            facts += _flat(value, f"{name}.")
        else:
            facts.append((name, " x ".join(map(str, value)) if isinstance(value, list) else value))
    return facts


def _markdown_table(table: Table) -> str:
    rows = [
        [column.title for column in table.columns],
        ["---:" if column.right else "---" for column in table.columns],
        *([_escape(cell) for cell in line.cells] for line in table.lines),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _escape(text: str) -> str:
    """Names are shown as text: no HTML, no table cell, no line of its own."""
    flat = " ".join(text.split())
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|")):
        flat = flat.replace(char, entity)
    return flat


def _backtick_runs(text: str) -> Sequence[str]:
    return ["".join(run) for char, run in groupby(text) if char == "`"]
