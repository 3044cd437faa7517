"""Validates what a stage published against the types of its metrics and of the JSON files beside them."""

from __future__ import annotations

import json
from typing import Any

from tests.support.typed import validate
from yolo_compress.evaluate import rows
from yolo_compress.report.schema import SensitivityFile
from yolo_compress.runtime.files import FileEntry
from yolo_compress.runtime.measure.layer_times import LayerTable
from yolo_compress.stages import file_types, metrics
from yolo_compress.store.environment import Environment
from yolo_compress.store.manifest import Artifact

METRICS: dict[str, Any] = {
    "baseline": metrics.ModelMetrics,
    "teacher": metrics.ModelMetrics,
    "sparsify": metrics.SparsifyMetrics,
    "prune": metrics.PruneMetrics,
    "distill": metrics.DistillMetrics,
    "qat": metrics.QatMetrics,
    "export": metrics.ExportMetrics,
    "engine": metrics.EngineMetrics,
    "bench": metrics.BenchMetrics,
    "control": metrics.ControlMetrics,
}
FILES: dict[tuple[str, str], Any] = {
    ("prune", "channels.json"): dict[str, list[int]],
    ("prune", "flops.json"): dict[str, list[int]],
    ("prune", "sensitivity.json"): SensitivityFile,
    ("qat", "sensitivity.json"): file_types.QatSensitivity,
    ("qat", "calibration.json"): list[file_types.CalibrationImage],
    ("export", "calibration.json"): list[file_types.CalibrationImage],
    ("engine", "engines.json"): list[rows.EngineRow],
    ("bench", "latency.json"): dict[str, list[list[float]]],
    ("prune", "latency.json"): LayerTable,
}


def check(artifact: Artifact) -> set[str]:
    """Raises pydantic's ValidationError where the artefact is not of its types; gives the JSON files that were validated."""
    manifest = artifact.manifest
    validate(manifest.files, dict[str, FileEntry])
    validate(manifest.environment, Environment)
    if artifact.stage in METRICS:
        validate(manifest.metrics, METRICS[artifact.stage])
    found = {name for stage, name in FILES if stage == artifact.stage and name in manifest.files}
    for name in found:
        validate(json.loads(artifact.file(name).read_text()), FILES[artifact.stage, name])
    return found
