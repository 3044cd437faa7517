"""Tables that compare the compressed model with the baseline on the same images."""

from __future__ import annotations

from collections.abc import Sequence

from yolo_compress.evaluate.ab.schema import AB, Difference, Part
from yolo_compress.report import numbers as n
from yolo_compress.report.charts.error_types import rows as error_rows
from yolo_compress.report.schema import ErrorTypes
from yolo_compress.report.tables.grid import Column, Line, Table

FIGURES = (
    Column("Figure", right=False),
    Column("Baseline"),
    Column("Compressed"),
    Column("Difference"),
    Column("95 % interval", rank=1),
)
PARTS = (Column("Part", right=False), Column("Objects"), *FIGURES[1:])
ERRORS = (
    Column("Type", right=False),
    Column("Cost, baseline"),
    Column("Cost, compressed"),
    Column("Count, baseline"),
    Column("Count, compressed"),
)


def figures_table(ab: AB | None) -> Table:
    """Return a table of mAP, latency, and the figures at the score threshold of the deployment."""
    if not ab:
        return Table("A/B", FIGURES, ())
    lines = [_difference("mAP50-95", ab["map50_95"]), _difference("mAP50", ab["map50"])]
    at = ab["operating"]
    a, b, conf = at["a"], at["b"], n.four_digits(at["conf"])
    for name, of_a, of_b, write in (
        (f"Recall at score {conf}", a["recall"], b["recall"], n.percent),
        (f"Missed at score {conf}", a["missed"], b["missed"], n.integer),
        (f"False positives at score {conf}", a["false_positives"], b["false_positives"], n.integer),
        ("False positives an image", a["false_positives_per_image"], b["false_positives_per_image"], n.fixed),
    ):
        lines.append(Line((name, write(of_a), write(of_b), n.change(of_a, of_b, write), n.DASH)))
    if latency := ab["latency"]:
        ends = n.interval(latency["low"], latency["high"], n.times)
        cells = (
            n.three_digits(latency["a_p50_ms"]),
            n.three_digits(latency["b_p50_ms"]),
            n.times(latency["ratio"]),
            ends,
        )
        lines.append(Line(("Latency p50, ms (difference: ratio)", *cells)))
    return Table("A/B", FIGURES, tuple(lines), tuple(_notes(ab)))


def _difference(name: str, part: Difference) -> Line:
    ends = n.interval(part["low"], part["high"], n.signed)
    return Line((name, n.fixed(part["a"]), n.fixed(part["b"]), n.signed(part["delta"]), ends))


def _notes(ab: AB) -> list[str]:
    settings, at = ab["settings"], ab["operating"]
    odd, found = at["mcnemar"], at["agreement"]
    notes = [
        f"A is {ab['a']['label']}; B is {ab['b']['label']}. Intervals are from {n.integer(settings['replicates'])} bootstrap "
        f"resamples of the {n.integer(ab['images'])} images, the same for both models, seed {settings['seed']}. The margin is "
        f"{n.percent(settings['margin'])} of the baseline's mAP50-95.",
        f"The baseline alone finds {n.integer(odd['a_only'])} objects and the compressed model alone {n.integer(odd['b_only'])}, "
        f"in {n.integer(odd['images'])} images (McNemar's test by image, p = {n.probability(odd['p'])}).",
    ]
    if (threshold := n.finite(at.get("threshold_b"))) is not None:
        notes.append(f"At score {n.four_digits(threshold)} the compressed model has the baseline's recall.")
    else:
        notes.append("The compressed model has the baseline's recall at no score.")
    latency = ab["latency"]
    if latency and (other := latency.get("a")) and other["row"] != ab["a"].get("row"):
        notes.append(f"Latency is that of {latency['b']['label']}, and of {other['label']} on the same runtime.")
    shift = at["score_shift"]
    if found["matched"]:
        notes.append(
            f"{n.integer(found['matched'])} detections are in both models (same class, IoU of 0.5 or more). The median IoU of their "
            f"boxes is {n.fixed(found['median_iou'])}, the 5th percentile {n.fixed(found['p05_iou'])}. The median change of score is "
            f"{n.signed(shift['median'])}; 80 % of the changes are from {n.signed(shift['p10'])} to {n.signed(shift['p90'])}."
        )
    return notes


def parts_table(title: str, parts: Sequence[Part]) -> Table:
    """Return a table of mAP50-95 by class or by size of object. Classes and sizes without objects are left out."""
    lines = []
    for part in parts:
        if part["truths"]:
            cells = _difference(str(part["name"]), part).cells
            lines.append(Line((cells[0], n.integer(part["truths"]), *cells[1:])))
    return Table(title, PARTS, tuple(lines))


def errors_table(errors: ErrorTypes | None) -> Table:
    """Return a table of TIDE's error types: how much AP50 rises without these errors, and their number at the score threshold."""
    lines = [
        Line((line.name, *map(n.percent, line.costs), *map(n.integer, line.counts)))
        for line in (error_rows(errors) if errors else ())
    ]
    notes = (
        (f"Costs are over all detections; counts are of those with a score above {n.four_digits(errors['conf'])}.",)
        if errors
        else ()
    )
    return Table("Error types", ERRORS, tuple(lines), notes)
