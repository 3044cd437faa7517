"""What bench and qat kept beside their figures, made ready for the document: raw latencies, detections, placement."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from yolo_compress.data.dataset import Dataset
from yolo_compress.evaluate import tide
from yolo_compress.evaluate.coco import absolute_boxes
from yolo_compress.evaluate.stored_detections import kept
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.report.charts.curves import every_per_cent
from yolo_compress.report.document import identified
from yolo_compress.report.gate import has_accuracy, judge, reference_row
from yolo_compress.report.intervals import REPLICATES, Interval, intervals
from yolo_compress.runtime.limits import counted
from yolo_compress.store.manifest import Artifact

DETECTIONS = "detections.npy"  # of a training stage

Line = dict[str, Any]  # a row of bench or a stage of the chain


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


def truths(job: Inputs) -> list[np.ndarray]:
    """One N5 array an image: class, xyxy in px."""
    return [absolute_boxes(sample) for sample in job.dataset.val]


def detections(job: Inputs, row: Mapping[str, Any]) -> list[np.ndarray]:
    """One N6 array an image, of a row measured here: xyxy in px of the image, score, class."""
    return kept(job.inputs["bench"].file(f"detections/{row['id']}.npy"), len(job.dataset.val))


def compared(rows: Sequence[Mapping[str, Any]], min_retention: float) -> tuple[Line, Line] | None:
    """The original in FP32 and the row measured here that decides the gate, with their `id`; None where either is missing."""
    named = {row["id"]: row for row in identified([row for row in rows if not row.get("device")])}
    gate = judge(list(named.values()), min_retention)
    return None if gate["worst"] is None else (named[gate["reference"]], named[gate["worst"]])


def with_intervals(
    job: Inputs, rows: Sequence[Mapping[str, Any]], chain: Sequence[Mapping[str, Any]]
) -> tuple[list[Line], list[Line]]:
    """Rows and stages with the 95 % intervals of their mAP, as far as their detections were kept."""
    named = identified(rows)
    reference = reference_row(named)
    assert job.recipe.report is not None
    replicates = min(REPLICATES, job.recipe.report.ab_replicates)
    if reference is None or not replicates:
        return [dict(row) for row in rows], [dict(stage) for stage in chain]
    models = {row["id"]: detections(job, row) for row in named if has_accuracy(row)}
    for stage in chain:
        artifact = job.inputs[stage["stage"]]
        if DETECTIONS in artifact.manifest.files:
            models[stage["stage"]] = kept(artifact.file(DETECTIONS), len(job.dataset.val))
    classes, seed, most = len(job.dataset.names), job.recipe.run.seed, counted(job.recipe.data.max_det)
    found = intervals(truths(job), models, reference["id"], classes, replicates, seed, most)
    return (
        [{**row, **found.get(row["id"], {})} for row in named],
        [{**stage, **_own_interval(stage["stage"], found)} for stage in chain],
    )


def as_compared(rows: Sequence[Mapping[str, Any]], ab: Mapping[str, Any] | None) -> list[Line]:
    """The rows with A/B's own intervals where it has them: it draws more often, and one figure stands in the report once."""
    if ab is None:
        return [dict(row) for row in rows]
    found = ab["map50_95"]
    ends: dict[str, Interval] = {
        ab["a"]["row"]: dict(zip(("map50_95_low", "map50_95_high"), found["interval_a"], strict=True)),
        ab["b"]["row"]: {
            **dict(zip(("map50_95_low", "map50_95_high"), found["interval_b"], strict=True)),
            "delta_low": found["low"],
            "delta_high": found["high"],
        },
    }
    return [{**row, **ends.get(row["id"], {})} for row in rows]


def _own_interval(stage: str, found: Mapping[str, Interval]) -> Interval:
    """The baseline has no difference from itself, and the teacher is another network."""
    ends = found.get(stage, {})
    return {key: end for key, end in ends.items() if not (key.startswith("delta") and stage in ("baseline", "teacher"))}


def error_types(job: Inputs, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """TIDE's types of both models compared, over all detections, and over those that one sees at `report.conf`."""
    assert job.recipe.report is not None
    config, actual = job.recipe.report, truths(job)
    both = compared(rows, config.min_retention)
    if both is None:
        return None
    most = counted(job.recipe.data.max_det)
    found: dict[str, Any] = {"conf": config.conf}
    for key, row in zip("ab", both, strict=True):
        model = detections(job, row)
        found[key] = tide.errors(actual, model, most)
        found[f"shown_{key}"] = tide.errors(
            actual, [boxes_N6[boxes_N6[:, 4] > config.conf] for boxes_N6 in model], most
        )
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
