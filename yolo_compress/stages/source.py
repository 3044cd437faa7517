"""A net that is given or trained from scratch: what `baseline` and `teacher` have in common."""

from __future__ import annotations

from typing import Any

from torch import nn

from yolo_compress import ultra
from yolo_compress.data import Dataset
from yolo_compress.errors import RecipeError
from yolo_compress.recipe import SourceConfig
from yolo_compress.stages import Job
from yolo_compress.stages.training import finish, fit
from yolo_compress.weights import find_weights


def run(job: Job, what: str) -> dict[str, Any]:
    """Take `weights`, checked against the data set, or train `model` from scratch."""
    config: SourceConfig = job.config
    model = start(config, job.dataset, job.recipe.run.seed, what)
    if config.weights is None:
        return finish(job, fit(job, model, [], what))
    return {**finish(job, model), "epochs": 0}


def start(config: SourceConfig, dataset: Dataset, seed: int, what: str) -> nn.Module:
    """The net before any training: `weights`, which must fit the data set, or a random `model`.

    Raises:
        RecipeError: The weights are of other classes, in another order, or of images of other channels.
    """
    if config.weights is None:
        return ultra.new_model(config.model, dataset.names, dataset.channels, seed)
    path = find_weights(config.weights)
    model = ultra.load_model(path)
    ultra.check_classes(model, dataset.names, f"{what}.weights={config.weights}")
    if ultra.image_channels(model) != dataset.channels:
        raise RecipeError(
            f"{path}: takes {ultra.image_channels(model)} image channels, the data set has {dataset.channels}"
        )
    return model
