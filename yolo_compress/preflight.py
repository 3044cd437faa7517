"""What is known before any stage runs: the data set, and errors in recipe, data and machine."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from yolo_compress import progress, ranks
from yolo_compress.chain import STAGES
from yolo_compress.data.dataset import Dataset, load, with_held_back, with_unlabelled
from yolo_compress.errors import RecipeError
from yolo_compress.recipe import auto_values
from yolo_compress.recipe.controls import REPEATED
from yolo_compress.recipe.knob_types import IMGSZ_STEP
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.store.resources import data_workers
from yolo_compress.store.store import Store

SHOWN = 10  # number of findings and notes on the data that a run prints


def prepare(recipe: Recipe, store: Store) -> tuple[Recipe, Dataset]:
    """Replace each `auto` in the recipe by a number, and check all images and labels. Print which images are left out.

    Returns:
        The recipe without `auto`, and the dataset of the images that passed.
    """
    dataset = _load_dataset(recipe, store)
    return auto_values.resolve(recipe, len(dataset.train), len(dataset.names)), dataset


def _load_dataset(recipe: Recipe, store: Store) -> Dataset:
    data = recipe.data
    cache = store.root / ".cache" / "data"
    dataset = load(
        data.yaml,
        limit_train=data.limit_train,
        limit_val=data.limit_val,
        max_unlabelled=data.max_unlabelled,
        max_det=data.max_det,
        on_bad=data.on_bad,
        allow_overlap=data.allow_overlap,
        cache=cache,
    )
    if recipe.distill and recipe.distill.images is not None:
        dataset = with_unlabelled(
            dataset, recipe.distill.images, on_bad=data.on_bad, allow_overlap=data.allow_overlap, cache=cache
        )
    if data.hold_back:
        dataset = with_held_back(dataset, data.hold_back)
        progress.say(f"data: {len(dataset.held)} training images are held back")
    if dataset.skipped:
        progress.say(f"data: {len(dataset.skipped)} findings, these images are left out of every model:")
        for finding in dataset.skipped[:SHOWN]:
            progress.say(f"  {finding}")
    for note in dataset.notes[:SHOWN]:
        progress.say(f"data: {note}")
    if len(dataset.notes) > SHOWN:
        progress.say(f"data: {len(dataset.notes) - SHOWN} more notes; `yolo-compress check` shows all")
    return dataset


def check(recipe: Recipe, dataset: Dataset, stages: Iterable[str] = tuple(STAGES)) -> None:
    """Run the checks of the given stages, which find errors in recipe, data and machine before any stage runs.

    Raises:
        CompressError: A check found an error. The function `check` of each module in `stages` lists its causes.
    """
    stages = list(stages)
    _check_batches(recipe, dataset, stages)
    for stage in stages:
        if STAGES[stage].checked and getattr(recipe, stage) is not None:
            importlib.import_module(f"yolo_compress.stages.{stage}").check(recipe, dataset)


def check_processes(recipe: Recipe, stages: Iterable[str]) -> None:
    """Check that the GPUs exist, one process for each, that each batch can be divided among them, and that data workers have room.

    Raises:
        RecipeError: A stage would train on several GPUs in one process, or its batch cannot be divided.
        EnvironmentLacks: A GPU does not exist, or `resources.data_workers` finds too little room.
    """
    stages = list(stages)
    trainings = _trainings(recipe, stages)
    if trainings and not ranks.several() and len(ranks.devices(recipe.run.device)) > 1:
        raise RecipeError(
            f"run.device={recipe.run.device}: {trainings[0]} trains on several GPUs only as a command of its own: "
            f"`yolo-compress {trainings[0]}` first, or one GPU"
        )
    if recipe.run.device != "cpu" and any(STAGES[stage].trains or stage == "bench" for stage in stages):
        import torch  # here, because `status` needs no torch

        ranks.check_devices(recipe.run.device, torch.cuda.device_count())
    for stage in trainings:
        batch = int(getattr(recipe, stage).batch)
        ranks.check_batch(f"{stage}.batch", batch)
        data_workers(recipe.run.device, recipe.run.workers, batch // ranks.world(), max(recipe.data.imgsz_hw))


def _trainings(recipe: Recipe, stages: Iterable[str]) -> list[str]:
    """Return the sections that the given stages train with: `epochs` is above 0 and no `weights` are given."""
    named = dict.fromkeys(name for stage in stages for name in (REPEATED if stage == "control" else (stage,)))
    sections = {name: getattr(recipe, name) for name in named if STAGES[name].trains}
    return [
        name
        for name, section in sections.items()
        if section and section.epochs and not getattr(section, "weights", None)
    ]


def _check_batches(recipe: Recipe, dataset: Dataset, stages: Iterable[str]) -> None:
    """Check that BatchNorm always has a variance to compute: more than one value per channel.

    If the deepest feature map has one pixel, a last batch of one image has only one value per channel.

    Raises:
        RecipeError: A stage has such a batch.
    """
    if max(recipe.data.imgsz_hw) > IMGSZ_STEP:
        return
    for stage in _trainings(recipe, stages):
        config = getattr(recipe, stage)
        images = -(-_training_images(config, dataset) // ranks.world())
        batch = min(int(config.batch) // ranks.world(), images)
        if batch == 1 or images % batch == 1:
            raise RecipeError(
                f"{stage}.batch={config.batch}: {images} training images leave one alone in the last batch, and at "
                f"data.imgsz={IMGSZ_STEP} the deepest layer sees one pixel of it, which BatchNorm cannot train on; set another "
                f"{stage}.batch, or a larger data.imgsz"
            )


def _training_images(config: Any, dataset: Dataset) -> int:
    """Return the number of images that a stage trains on: images of the dataset, or unlabelled images of `distill`."""
    if getattr(config, "images", None) is not None:
        return len(dataset.unlabelled)
    return getattr(config, "data_free", None) or len(dataset.train)
