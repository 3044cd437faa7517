"""The model as it is before anything is done to it: everything later is measured against it."""

from __future__ import annotations

from yolo_compress.data.dataset import Dataset
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.stages import Job, _source
from yolo_compress.stages.metrics import ModelMetrics


def run(job: Job) -> ModelMetrics:
    """`model.pt` of the given or trained baseline."""
    return _source.run(job, "baseline")


def check(recipe: Recipe, dataset: Dataset) -> None:
    """Refuse, before any stage runs, a baseline that cannot be taken or compressed; see `source.start`."""
    _source.start(recipe.baseline, dataset, recipe.run.seed, "baseline")
