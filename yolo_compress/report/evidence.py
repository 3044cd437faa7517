"""What bench and qat kept beside their figures, made ready for the document: raw latencies, detections, placement."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from yolo_compress.artifact import Artifact
from yolo_compress.data import Dataset
from yolo_compress.evaluate import kept, tide
from yolo_compress.evaluate.coco import absolute_boxes
from yolo_compress.recipe import Recipe
from yolo_compress.report.curves import every_per_cent
from yolo_compress.report.intervals import intervals

DETECTIONS = "detections.npy"  # of a training stage


class Inputs(Protocol):
    """What is read of `stages.Job`, which this layer does not know."""

    @property
    def inputs(self) -> Mapping[str, Artifact]: ...
    @property
    def dataset(self) -> Dataset: ...
    @property
    def recipe(self) -> Recipe: ...


def latency_quantiles(bench: Artifact) -> dict[str, list[float]]:
    """Milliseconds at every per cent of the raw calls, by row."""
    raw = json.loads(bench.file("latency.json").read_text())
    return {name: every_per_cent([ms for calls in rounds for ms in calls]) for name, rounds in raw.items() if rounds}


def detections(bench: Artifact, row: Mapping[str, Any], images: int) -> list[np.ndarray]:
    """One N6 array an image: xyxy in px of the image, score, class."""
    return kept.load(bench.file(f"detections/{row_id(row)}.npy"), images)


def row_id(row: Mapping[str, Any]) -> str:
    """Of a row measured here, as the document has it and as bench names its files."""
    return f"{row['model']}-{row['runtime']}-{row['precision']}"


def compared(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The original in FP32 and the compressed model in INT8, where there is one: what pictures and error types show."""
    measured = [row for row in rows if row["status"] == "ok"]
    original = [row for row in measured if row["model"] == "original" and row["precision"] == "fp32"]
    compressed = [row for row in measured if row["model"] == "compressed"]
    if not original or not compressed:
        return None
    return original[0], next((row for row in compressed if row["precision"] == "int8"), compressed[0])


Lines = list[dict[str, Any]]


def with_intervals(
    job: Inputs, rows: Sequence[Mapping[str, Any]], chain: Sequence[Mapping[str, Any]]
) -> tuple[Lines, Lines]:
    """Rows and stages with the 95 % intervals of their mAP, as far as their detections were kept."""
    both = compared(rows)
    if both is None:
        return [dict(row) for row in rows], [dict(stage) for stage in chain]
    images = len(job.dataset.val)
    models = {row_id(row): detections(job.inputs["bench"], row, images) for row in rows if row["status"] == "ok"}
    for stage in chain:
        artifact = job.inputs[stage["stage"]]
        if DETECTIONS in artifact.manifest.files:
            models[stage["stage"]] = kept.load(artifact.file(DETECTIONS), images)
    truths = [absolute_boxes(sample) for sample in job.dataset.val]
    found = intervals(truths, models, row_id(both[0]), len(job.dataset.names), job.recipe.run.seed)
    return (
        [{**row, **found.get(row_id(row), {})} for row in rows],
        [{**stage, **found.get(stage["stage"], {})} for stage in chain],
    )


def error_types(job: Inputs, rows: Sequence[Mapping[str, Any]], conf: float) -> dict[str, Any] | None:
    """TIDE's types of both models compared, over all detections, and over those that one sees at `conf`."""
    both = compared(rows)
    if both is None:
        return None
    truths = [absolute_boxes(sample) for sample in job.dataset.val]
    found: dict[str, Any] = {"conf": conf}
    for key, row in zip("ab", both, strict=True):
        model = detections(job.inputs["bench"], row, len(truths))
        found[key] = tide.errors(truths, model)
        found[f"shown_{key}"] = tide.errors(truths, [boxes_N6[boxes_N6[:, 4] >= conf] for boxes_N6 in model])
    return found


def placement(qat: Artifact) -> list[dict[str, str]]:
    """Rows of placement.csv; an artefact of an earlier version has none."""
    if "placement.csv" not in qat.manifest.files:
        return []
    return list(csv.DictReader(qat.file("placement.csv").read_text(encoding="utf-8").splitlines()))


def quantisation(qat: Artifact) -> dict[str, Any] | None:
    """What `qat.sensitivity` measured, where it was asked to."""
    if "sensitivity.json" not in qat.manifest.files:
        return None
    return dict(json.loads(qat.file("sensitivity.json").read_text(encoding="utf-8")))
