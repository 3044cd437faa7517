"""Read and compute measurements for the report, from the latencies, detections, placement and sensitivity that stages stored."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol, cast

import numpy as np

from yolo_compress.data.dataset import Dataset
from yolo_compress.evaluate import tide
from yolo_compress.evaluate.ab.schema import AB
from yolo_compress.evaluate.bootstrap import interval
from yolo_compress.evaluate.coco import absolute_boxes
from yolo_compress.evaluate.stored_detections import kept
from yolo_compress.recipe import controls
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.report.bench_rows import has_accuracy, reference_row, with_keys
from yolo_compress.report.charts.curves import every_per_cent
from yolo_compress.report.controls import added, steps
from yolo_compress.report.gate import judge
from yolo_compress.report.intervals import REPLICATES, intervals, resampled
from yolo_compress.report.schema import (
    BenchRow,
    Control,
    ErrorTypes,
    Interval,
    ModelErrors,
    QuantisationFile,
    StageFigures,
    Tensor,
)
from yolo_compress.runtime.max_detections import counted
from yolo_compress.store.manifest import Artifact

DETECTIONS = "detections.npy"  # of a training stage
CONTROL_FIGURES = ("map50_95", "map50", "compute_gflops", "parameters")


class Inputs(Protocol):
    """The attributes of `stages.Job` that this module uses. `report` may not import the class from `stages`."""

    @property
    def inputs(self) -> Mapping[str, Artifact]: ...
    @property
    def dataset(self) -> Dataset: ...
    @property
    def recipe(self) -> Recipe: ...


def latency_quantiles(bench: Artifact) -> dict[str, list[float]]:
    """Return the latencies in ms at 0, 1, ..., 100 % of the timed calls, by row id."""
    raw = json.loads(bench.file("latency.json").read_text())
    return {name: every_per_cent([ms for calls in rounds for ms in calls]) for name, rounds in raw.items() if rounds}


def truths(job: Inputs) -> list[np.ndarray]:
    """Return the ground-truth boxes of each validation image: (N, 5) array, columns class, x1, y1, x2, y2 in px."""
    return [absolute_boxes(sample) for sample in job.dataset.val]


def detections(job: Inputs, row: BenchRow) -> list[np.ndarray]:
    """Return the stored detections of each validation image: (N, 6) array, columns x1, y1, x2, y2 in px, score, class.

    `row` must be of this machine.
    """
    return kept(job.inputs["bench"].file(f"detections/{row['id']}.npy"), len(job.dataset.val))


def compared_rows(rows: Sequence[BenchRow], min_retention: float) -> tuple[BenchRow, BenchRow] | None:
    """Return the baseline's FP32 row and the gate's row with the least retention, both of this machine.

    Return None if either row is missing.
    """
    here = {row["id"]: row for row in rows if not row.get("device")}
    gate = judge(list(here.values()), min_retention)
    if gate["reference"] is None or gate["worst"] is None:
        return None
    return here[gate["reference"]], here[gate["worst"]]


def with_intervals(
    job: Inputs, rows: Sequence[BenchRow], chain: Sequence[StageFigures]
) -> tuple[list[BenchRow], list[StageFigures]]:
    """Return the rows and stages with 95 % intervals of mAP, wherever the detections are stored."""
    reference = reference_row(rows)
    assert job.recipe.report is not None
    replicates = min(REPLICATES, job.recipe.report.ab_replicates)
    if reference is None or not replicates:
        return list(rows), list(chain)
    models = {row["id"]: detections(job, row) for row in rows if has_accuracy(row)}
    for stage in chain:
        artifact = job.inputs[stage["stage"]]
        if DETECTIONS in artifact.manifest.files:
            models[stage["stage"]] = kept(artifact.file(DETECTIONS), len(job.dataset.val))
    classes, seed, most = len(job.dataset.names), job.recipe.run.seed, counted(job.recipe.data.max_det)
    found = intervals(truths(job), models, reference["id"], classes, replicates, seed, most)
    return (
        [with_keys(row, found.get(row["id"], Interval())) for row in rows],
        [with_keys(stage, _own_interval(stage["stage"], found)) for stage in chain],
    )


def _own_interval(stage: str, found: Mapping[str, Interval]) -> Mapping[str, object]:
    """Return the mAP interval of a stage. The interval of the difference from the baseline is left out for baseline and teacher."""
    ends = found.get(stage, Interval())
    return {key: end for key, end in ends.items() if not (key.startswith("delta") and stage in ("baseline", "teacher"))}


def control(job: Inputs) -> Control | None:
    """Return the comparison with the controls, with the interval of each step if detections are stored.

    Return None if the recipe has no section `control`.
    """
    if job.recipe.control is None:
        return None
    artifact = job.inputs["control"]
    found: Control = {"steps": [], "best": None, "retention": None, "skipped": artifact.metrics["skipped"]}
    if found["skipped"] is not None:
        return found
    files = {name: artifact.file(f"{name}/{DETECTIONS}") for name in artifact.metrics["models"]}
    ends = {"baseline": job.inputs["baseline"], "compressed": job.inputs["distill"]}
    figures = {**artifact.metrics["models"], **{name: end.metrics for name, end in ends.items()}}
    epochs = {"baseline": 0, "compressed": controls.epochs(job.recipe)}
    models = {
        name: {key: figures[name][key] for key in CONTROL_FIGURES}
        | {"epochs": epochs.get(name, figures[name]["epochs"])}
        for name in figures
    }
    found["steps"] = steps(added(job.recipe), models)
    stored = {name: end.file(DETECTIONS) for name, end in ends.items() if DETECTIONS in end.manifest.files}
    assert job.recipe.report is not None
    replicates = min(REPLICATES, job.recipe.report.ab_replicates)
    if replicates and len(stored) == len(ends):
        loaded = {name: kept(file, len(job.dataset.val)) for name, file in (files | stored).items()}
        classes, seed, most = len(job.dataset.names), job.recipe.run.seed, counted(job.recipe.data.max_det)
        map_R = resampled(truths(job), loaded, classes, replicates, seed, most)
        for before, step in pairwise(found["steps"]):
            step["change_low"], step["change_high"] = interval(map_R[step["name"]] - map_R[before["name"]])
    return found


def with_ab_intervals(rows: Sequence[BenchRow], ab: AB | None) -> list[BenchRow]:
    """Return the rows, and give the two rows of the A/B comparison its intervals of mAP.

    The A/B comparison uses more resamples. The report must not show two different intervals of one mAP.
    """
    if ab is None:
        return list(rows)
    found = ab["map50_95"]
    (low_a, high_a), (low_b, high_b) = found["interval_a"], found["interval_b"]
    ends: dict[str, Interval] = {
        ab["a"]["row"]: {"map50_95_low": low_a, "map50_95_high": high_a},
        ab["b"]["row"]: {
            "map50_95_low": low_b,
            "map50_95_high": high_b,
            "delta_low": found["low"],
            "delta_high": found["high"],
        },
    }
    return [with_keys(row, ends.get(row["id"], Interval())) for row in rows]


def error_types(job: Inputs, rows: Sequence[BenchRow]) -> ErrorTypes | None:
    """Return TIDE's error types of the two `compared_rows`: for all detections, and for the detections above `report.conf`."""
    assert job.recipe.report is not None
    conf = job.recipe.report.conf
    both = compared_rows(rows, job.recipe.report.min_retention)
    if both is None:
        return None
    actual = truths(job)
    (a, shown_a), (b, shown_b) = (_model_errors(job, actual, row, conf) for row in both)
    return {"conf": conf, "a": a, "shown_a": shown_a, "b": b, "shown_b": shown_b}


def _model_errors(
    job: Inputs, actual: Sequence[np.ndarray], row: BenchRow, conf: float
) -> tuple[ModelErrors, ModelErrors]:
    """Return TIDE's errors of one row twice: for all detections, and for the detections with a score above `conf`."""
    found, most = detections(job, row), counted(job.recipe.data.max_det)
    shown = [boxes_N6[boxes_N6[:, 4] > conf] for boxes_N6 in found]
    return tide.errors(actual, found, most), tide.errors(actual, shown, most)


def placement(qat: Artifact) -> list[Tensor]:
    """Return the rows of `placement.csv`: the precision of each tensor. Empty for an artefact of an earlier version."""
    if "placement.csv" not in qat.manifest.files:
        return []
    lines = qat.file("placement.csv").read_text(encoding="utf-8").splitlines()
    return [cast(Tensor, row) for row in csv.DictReader(lines)]


def quantisation(qat: Artifact) -> QuantisationFile | None:
    """Return the measured sensitivity to INT8, or None if `qat.sensitivity` was off."""
    if "sensitivity.json" not in qat.manifest.files:
        return None
    return cast(QuantisationFile, json.loads(qat.file("sensitivity.json").read_text(encoding="utf-8")))
