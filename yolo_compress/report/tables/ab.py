"""The compressed model against the original on the same images, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from yolo_compress.report import numbers as n
from yolo_compress.report.charts.error_types import rows as error_rows
from yolo_compress.report.schema import AB, Difference, ErrorTypes, Part
from yolo_compress.report.tables.grid import Column, Line, Table

FIGURES = (
    Column("Figure", right=False),
    Column("Original"),
    Column("Compressed"),
    Column("Difference"),
    Column("95 % interval", rank=1),
)
PARTS = (Column("Part", right=False), Column("Objects"), *FIGURES[1:])
ERRORS = (
    Column("Type", right=False),
    Column("Original costs"),
    Column("Compressed costs"),
    Column("Original, seen"),
    Column("Compressed, seen"),
)


def figures_table(ab: AB | None) -> Table:
    """mAP, what one sees at the deployed threshold, and latency."""
    if not ab:
        return Table("A/B", FIGURES, ())
    lines = [_difference("mAP50-95", ab["map50_95"]), _difference("mAP50", ab["map50"])]
    at = ab["operating"]
    a, b, conf = at["a"], at["b"], n.plain(at["conf"])
    for name, of_a, of_b, write in (
        (f"Recall at score {conf}", a["recall"], b["recall"], n.percent),
        (f"Missed at score {conf}", a["missed"], b["missed"], n.whole),
        (f"False positives at score {conf}", a["false_positives"], b["false_positives"], n.whole),
        ("False positives an image", a["false_positives_per_image"], b["false_positives_per_image"], n.fixed),
    ):
        lines.append(Line((name, write(of_a), write(of_b), n.change(of_a, of_b, write), n.DASH)))
    if latency := ab["latency"]:
        ends = n.interval(latency["low"], latency["high"], n.times)
        cells = (n.three(latency["a_p50_ms"]), n.three(latency["b_p50_ms"]), n.times(latency["ratio"]), ends)
        lines.append(Line(("Latency p50, ms (difference: ratio)", *cells)))
    return Table("A/B", FIGURES, tuple(lines), tuple(_notes(ab)))


def _difference(name: str, part: Difference) -> Line:
    ends = n.interval(part["low"], part["high"], n.signed)
    return Line((name, n.fixed(part["a"]), n.fixed(part["b"]), n.signed(part["delta"]), ends))


def _notes(ab: AB) -> list[str]:
    settings, at = ab["settings"], ab["operating"]
    odd, found = at["mcnemar"], at["agreement"]
    notes = [
        f"A is {ab['a']['label']}, B is {ab['b']['label']}; {n.whole(settings['replicates'])} bootstrap replicates of the "
        f"{n.whole(ab['images'])} images, both models on the same ones, seed {settings['seed']}; margin "
        f"{n.percent(settings['margin'])} of the original's mAP50-95.",
        f"Of the objects, {n.whole(odd['a_only'])} were found by the original alone and {n.whole(odd['b_only'])} by the "
        f"compressed model alone, in {n.whole(odd['images'])} images (McNemar's test by image, p = {n.probability(odd['p'])}).",
    ]
    if (threshold := n.finite(at.get("threshold_b"))) is not None:
        notes.append(f"At score {n.plain(threshold)} the compressed model has the original's recall.")
    else:
        notes.append("The compressed model has the original's recall at no score.")
    latency = ab["latency"]
    if latency and (other := latency.get("a")) and other["row"] != ab["a"].get("row"):
        own = latency["b"]
        whose = "the compressed model" if own["row"] == ab["b"].get("row") else own["label"]
        notes.append(f"Latency is that of {whose} against {other['label']}, which runs in the same place.")
    shift = at["score_shift"]
    if found["matched"]:
        notes.append(
            f"{n.whole(found['matched'])} detections are shared (same class, IoU of 0.5 or more): their boxes overlap with an "
            f"IoU of {n.fixed(found['median_iou'])} in the median and {n.fixed(found['p05_iou'])} at 5 %; their scores moved by "
            f"{n.signed(shift['median'])} in the median, 80 % of them by {n.signed(shift['p10'])} to {n.signed(shift['p90'])}."
        )
    return notes


def parts_table(title: str, parts: Sequence[Part]) -> Table:
    """mAP50-95 by class or by size of object; those without any object are left out."""
    lines = []
    for part in parts:
        if part["truths"]:
            cells = _difference(str(part["name"]), part).cells
            lines.append(Line((cells[0], n.whole(part["truths"]), *cells[1:])))
    return Table(title, PARTS, tuple(lines))


def errors_table(errors: ErrorTypes | None) -> Table:
    """TIDE's types: the rise of AP50 if a type were mended, and how many one sees at the score shown."""
    lines = [
        Line((line.name, *map(n.percent, line.costs), *map(n.whole, line.counts)))
        for line in (error_rows(errors) if errors else ())
    ]
    notes = (f"Seen: with a score above {n.plain(errors['conf'])}.",) if errors else ()
    return Table("Error types", ERRORS, tuple(lines), notes)
