"""Render the report as one HTML file without scripts and without links to other files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from yolo_compress.report import numbers as n
from yolo_compress.report.as_text import gate_lines, missing_lines, provenance, untested_lines
from yolo_compress.report.bench_rows import label, peer_row
from yolo_compress.report.charts.curves import precision_over_recall, time_distribution
from yolo_compress.report.charts.error_types import error_costs
from yolo_compress.report.charts.forest import differences, left_out
from yolo_compress.report.charts.gallery import MIN_SCORE, Gallery
from yolo_compress.report.charts.plots import (
    channels_kept,
    flops_per_convolution,
    flops_per_layer,
    gamma_histograms,
    recovery_curve,
)
from yolo_compress.report.charts.quantised import gains_of_groups, precisions, quantisation_table, summary
from yolo_compress.report.charts.scatter import accuracy_over_latency
from yolo_compress.report.charts.sensitivity import sensitivity_curves
from yolo_compress.report.gate import gain
from yolo_compress.report.schema import Document
from yolo_compress.report.tables.ab import errors_table, figures_table, parts_table
from yolo_compress.report.tables.bench import bench_table, device_lines, devices_table, files_table
from yolo_compress.report.tables.cascade import cascade_table
from yolo_compress.report.tables.chain import chain_table, pruning_table
from yolo_compress.report.tables.control import control_table


def render(document: Document, gallery: Gallery) -> str:
    """Return the report as an HTML page. All text from outside (names, files, YAML) is escaped. Only the SVG of this package is not."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["signs"] = signs
    ab = document["ab"]
    charts = {
        "scatter": accuracy_over_latency(document),
        "gammas": gamma_histograms(document["gammas"]),
        "channels": channels_kept(document["channels"]),
        "recovery": recovery_curve(document["recovery"]),
        "flops": flops_per_layer(document["flops"]),
        "convolutions": flops_per_convolution(document["flops"]),
        "sensitivity": sensitivity_curves(document["sensitivity"]),
        "precision": precision_over_recall(ab),
        "forest": differences(ab),
        "errors": error_costs(document["errors"]),
        "times": time_distribution(document),
        "quantisation": gains_of_groups(document["quantisation"]),
        "placement": precisions(document["placement"]),
    }
    page = environment.get_template("report.html.j2").render(
        document=document,
        tiles=tiles(document),
        judged=_judged(document),
        gate_lines=gate_lines(document),
        chain=chain_table(document),
        control=control_table(document["control"]),
        bench=bench_table(document),
        pruning=pruning_table(document),
        files=files_table(document),
        devices=devices_table(document),
        device_lines=device_lines(document),
        cascades=cascade_table(document.get("cascades", []), document["devices"]),
        ab_figures=figures_table(ab),
        ab_parts=[
            parts_table("By size of object", ab["by_size"] if ab else ()),
            parts_table("By class", ab["by_class"] if ab else ()),
        ],
        classes_left_out=left_out(ab),
        errors=errors_table(document["errors"]),
        quantisation=quantisation_table(document["quantisation"]),
        placement=summary(document["placement"]),
        charts={name: {size: Markup(svg) for size, svg in both.items()} for name, both in charts.items()},
        gallery=gallery,
        missing=missing_lines(document),
        untested=untested_lines(document),
        provenance=provenance(document),
        bound=n.percent(document["gate"]["min_retention"]),
        shown_score=n.four_digits(ab["settings"]["conf"] if ab else MIN_SCORE),
    )
    return page.replace("<!-- nav -->", _navigation(page), 1)


def _navigation(page: str) -> str:
    """Return links to all sections of the page. The titles come from the template and need no escaping."""
    links = [f'<li><a href="#{name}">{title}</a></li>' for name, title in re.findall(r'<h2 id="(\w+)">([^<]+)<', page)]
    return f'<nav aria-label="Sections"><ul>{"".join(links)}</ul></nav>'


def signs(text: str) -> str:
    """Replace `->` by an arrow and the x of `2.4x` by a multiplication sign. The result is not escaped."""
    return re.sub(r"(?<=\d)x(?!\w)", "\u00d7", text.replace("->", "→"))


class Tile(NamedTuple):
    """A box of the page with one measurement, as text: `now` for the judged row, `was` for the FP32 baseline, `gain` for the ratio."""

    title: str
    now: str
    was: str
    gain: str


def tiles(document: Document) -> list[Tile]:
    """Return tiles for the mAP of the worst row, and for latency and size of the worst row with a latency."""
    rows = {row["id"]: row for row in document["rows"]}
    row = rows.get(document["verdict"]["row"] or "")
    if row is None:
        return []
    reference = rows.get(document["gate"]["reference"] or "")
    was = n.fixed(reference["map50_95"] if reference else None)
    shown = [Tile("mAP50-95", n.fixed(row["map50_95"]), was, n.percent(row["retention"]))]
    row = rows.get(document["gate"]["timed"] or "", row)
    peer = peer_row(document["rows"], row)
    for title, key, write, gained in (
        ("Latency p50, ms", "latency_p50_ms", n.three_digits, gain(row["speed_up"], "faster", "slower")),
        ("Size, MiB", "size_mib", n.three_digits, gain(row["size_ratio"], "smaller", "larger")),
        ("Parameters", "parameters", n.millions, None),
        ("GFLOPs", "compute_gflops", n.three_digits, None),
    ):
        after, before = n.finite(row.get(key)), n.finite(peer.get(key)) if peer else None
        if after is None:
            continue
        if gained is None:
            gained = n.percent(after / before, 0) if before else ""
        shown.append(Tile(title, write(after), "" if before is None else write(before), gained))
    return shown


class JudgedLine(NamedTuple):
    """A bench row that the gate judged, as text. `reason` is empty if the row has a retention."""

    label: str
    retention: str
    passed: bool
    reason: str


def _judged(document: Document) -> list[JudgedLine]:
    rows = {row["id"]: row for row in document["rows"]}
    lines = []
    for entry in document["gate"]["judged"]:
        retention, text, reason = entry["retention"], n.DASH, entry["reason"] or ""
        if retention is not None:
            text, reason = n.percent_apart(retention, document["gate"]["min_retention"])[0], ""
        lines.append(JudgedLine(label(rows[entry["id"]]), text, entry["passed"], reason))
    return lines
