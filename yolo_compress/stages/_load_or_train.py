"""Load a model, or train it from a checkpoint or from scratch. `baseline` and `teacher` share this code."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from yolo_compress import progress
from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import RecipeError
from yolo_compress.export.nms import NO_NMS
from yolo_compress.nets import detect
from yolo_compress.nets.families import check_prunable
from yolo_compress.recipe.knob_types import IMGSZ_STEP
from yolo_compress.recipe.recipe import Recipe, SourceConfig
from yolo_compress.stages import Job
from yolo_compress.stages._training import finish, fit
from yolo_compress.stages.metrics import ModelMetrics
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint, transfer
from yolo_compress.train.transfer import Taken


def run(job: Job, what: str) -> ModelMetrics:
    """Load the model `weights`, or train a model from the checkpoint `pretrained` or from random weights (`model`).

    Return the metrics of the stage.
    """
    config: SourceConfig = job.config
    model = start(config, job.dataset, job.recipe.run.seed, what, progress.say)
    if config.weights is not None:
        return {**finish(job, model), "epochs": 0}
    return finish(job, fit(job, model, [], what, freeze=config.freeze))


def check(recipe: Recipe, dataset: Dataset, what: str) -> None:
    """Check, before any stage runs, that the model of the section `what` can be loaded and fits `data.imgsz` and `export.nms`.

    Raises:
        RecipeError: See `start`, or `data.imgsz` does not fit the strides of the model, or `export.nms` is set for a model whose
            boxes need no NMS.
    """
    model = start(getattr(recipe, what), dataset, recipe.run.seed, what)
    if what == "baseline" and recipe.export and recipe.export.nms and not detect.needs_nms(model):
        raise RecipeError(f"export.nms: {NO_NMS}")
    stride = int(max(model.stride))  # type: ignore[arg-type]
    height, width = recipe.data.imgsz_hw
    least = IMGSZ_STEP if stride <= IMGSZ_STEP else 2 * stride  # BatchNorm cannot train on a single pixel
    if height % stride or width % stride or max(height, width) < least:
        raise RecipeError(
            f"data.imgsz={height},{width}: the largest stride of the {what} is {stride}; set multiples of {stride}, "
            f"one of them {least} or more"
        )


def start(
    config: SourceConfig, dataset: Dataset, seed: int, what: str, say: Callable[[str], None] = lambda text: None
) -> nn.Module:
    """Return the model that a section starts from, before any training.

    Args:
        config: Section of the model in the recipe.
        dataset: Dataset with the required classes and image channels.
        seed: Seed of the weights that are not in a checkpoint.
        what: "baseline" or "teacher". All blocks of a baseline must be prunable.
        say: Receives a line on the weights that came from a checkpoint.

    Raises:
        RecipeError: `weights` has other classes or another order, or a checkpoint has other image channels, or is of another
            architecture or task.
    """
    if config.model is not None:
        return checkpoint.new_model(config.model, dataset.names, dataset.channels, seed)
    key = f"{what}.{config.origin}={config.checkpoint}"
    path = find_weights(str(config.checkpoint))
    if config.pretrained is None:
        model = checkpoint.load_model(path)
        _check_classes(model, dataset, key, what)
    else:
        model, taken = transfer.load_pretrained(path, dataset.names, seed, config.detection_part)
        say(_text(taken, key, what, dataset))
    if (channels := checkpoint.image_channels(model)) != dataset.channels:
        raise RecipeError(f"{key}: takes {channels} image channels, the data set has {dataset.channels}")
    if what == "baseline":
        try:
            check_prunable(model)
        except RecipeError as error:
            raise RecipeError(f"{key}: {str(error).removeprefix('prune: ')}") from None
    return model


def _check_classes(model: nn.Module, dataset: Dataset, key: str, what: str) -> None:
    try:
        checkpoint.check_classes(model, dataset.names, key)
    except RecipeError as error:
        name = key.partition("=")[2]
        raise RecipeError(f"{error}. To train it on the classes of the data set: {what}.pretrained={name}") from None


def _text(taken: Taken, key: str, what: str, dataset: Dataset) -> str:
    text = (
        f"{what}: {taken.tensors} of {taken.of_tensors} tensors, {taken.parameters:,} of {taken.of_parameters:,} parameters "
        f"from {key.partition('=')[2]}"
    )
    if taken.same:
        return text + f"; its classes are those of the data set: {what}.weights loads it without training"
    if len(taken.classes) == len(dataset.names):
        return text + "; it has all classes of the data set, and its class outputs are copied by name"
    if not taken.classes:
        return text + "; the class outputs are initialised"
    shown = ", ".join(taken.classes[:5]) + (f" and {len(taken.classes) - 5} more" if len(taken.classes) > 5 else "")
    return text + f"; the class outputs are initialised, except for {shown}, which are copied"
