"""A net that is given or trained from scratch: what `baseline` and `teacher` have in common."""

from __future__ import annotations

from typing import Any

from yolo_compress import ultra
from yolo_compress.errors import RecipeError
from yolo_compress.recipe import SourceConfig
from yolo_compress.stages import Job
from yolo_compress.stages.training import finish, fit
from yolo_compress.weights import find_weights


def run(job: Job, what: str) -> dict[str, Any]:
    """Take `weights`, checked against the data set, or train `model` from scratch."""
    config: SourceConfig = job.config
    names, channels = job.dataset.names, job.dataset.channels
    if config.weights is None:
        model = fit(job, ultra.new_model(config.model, names, channels, job.recipe.run.seed), [], what)
        return finish(job, model)
    path = find_weights(config.weights)
    model = ultra.load_model(path)
    ultra.check_classes(model, names, f"{what}.weights={config.weights}")
    if ultra.image_channels(model) != channels:
        raise RecipeError(f"{path}: takes {ultra.image_channels(model)} image channels, the data set has {channels}")
    return {**finish(job, model), "epochs": 0}
