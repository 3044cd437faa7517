"""Stage `baseline`: the model before compression. All later figures are relative to it."""

from __future__ import annotations

from yolo_compress.data.dataset import Dataset
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.stages import Job, _load_or_train
from yolo_compress.stages.metrics import ModelMetrics


def run(job: Job) -> ModelMetrics:
    """Load or train the baseline, write it as `model.pt`, and return its metrics."""
    return _load_or_train.run(job, "baseline")


def check(recipe: Recipe, dataset: Dataset) -> None:
    """Check, before any stage runs, that the baseline can be loaded and compressed; see `_load_or_train.check`."""
    _load_or_train.check(recipe, dataset, "baseline")
