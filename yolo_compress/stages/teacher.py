"""Stage `teacher`: load the model that teaches in `distill`, or train it on the same data."""

from __future__ import annotations

from yolo_compress.data.dataset import Dataset
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.stages import Job, _load_or_train
from yolo_compress.stages.metrics import ModelMetrics


def run(job: Job) -> ModelMetrics:
    """Load or train the teacher, write it as `model.pt`, and return its metrics."""
    return _load_or_train.run(job, "teacher")


def check(recipe: Recipe, dataset: Dataset) -> None:
    """Check, before any stage runs, that the teacher can be loaded; see `_load_or_train.check`."""
    _load_or_train.check(recipe, dataset, "teacher")
