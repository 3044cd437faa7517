"""The model that teaches in `distill`: given, or trained on the same data."""

from __future__ import annotations

from yolo_compress.data.dataset import Dataset
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.stages import Job, _source
from yolo_compress.stages.metrics import ModelMetrics


def run(job: Job) -> ModelMetrics:
    """`model.pt` of the teacher."""
    return _source.run(job, "teacher")


def check(recipe: Recipe, dataset: Dataset) -> None:
    """Refuse, before any stage runs, a teacher that cannot be taken; see `source.start`."""
    assert recipe.teacher is not None
    _source.start(recipe.teacher, dataset, recipe.run.seed, "teacher")
