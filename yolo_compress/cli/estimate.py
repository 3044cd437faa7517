"""Estimate the training time of the stages of a recipe on this machine, from a few timed training steps."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import nn

from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import EnvironmentLacks
from yolo_compress.prune.cost import conv_macs
from yolo_compress.recipe.controls import PRUNED_STEP
from yolo_compress.recipe.recipe import Recipe, TrainConfig
from yolo_compress.train import losses
from yolo_compress.train.settings import multiplies_bfloat16

TIMED_STEPS = 2
FORWARD = 1 / 3  # forward pass of a teacher, or validation of an image, relative to a training step
# Factor for augmentation, optimizer and EMA: an epoch takes 4.6 s, its steps alone 3.2 s (YOLOv8n, 55 images, 320 px, 2 cores).
OVERHEAD = 1.45
BFLOAT16_STEP = 0.63  # step in bfloat16, relative to float32 (benchmarks/trainer_overhead.py --mixed)


def seconds(chosen: Recipe, dataset: Dataset, models: Mapping[str, nn.Module]) -> dict[str, float]:
    """Return the estimated seconds of each stage that trains.

    Args:
        chosen: The recipe, with every `auto` resolved.
        dataset: The data set of the recipe.
        models: The models before training: `baseline`, and `teacher` if the recipe has a teacher.

    Raises:
        EnvironmentLacks: A batch does not fit into memory.
    """
    macs = {name: conv_macs(model, chosen.data.imgsz_hw) for name, model in models.items()}
    teacher = macs.get("teacher", macs["baseline"]) / macs["baseline"]
    relative = {  # time per image, relative to a training step of the baseline
        "teacher": teacher,
        "baseline": 1.0,
        "sparsify": 1.0,
        "prune": PRUNED_STEP + FORWARD,
        "distill": PRUNED_STEP + FORWARD * teacher,
        "qat": PRUNED_STEP + FORWARD,
    }
    trained = {name: section for name in relative if (section := _trained(chosen, name))}
    if not trained:
        return {}
    image_seconds = _step_seconds(
        chosen, dataset, models["baseline"], max(int(section.batch) for section in trained.values())
    )
    estimates, every = {}, chosen.run.val_every
    for name, section in trained.items():
        epochs = int(section.epochs)
        validated = len(dataset.val) * (1 + (epochs // every if every else 0)) * FORWARD
        estimates[name] = image_seconds * relative[name] * (epochs * len(dataset.train) + validated)
    return estimates


def _trained(chosen: Recipe, name: str) -> TrainConfig | None:
    """Return the section of a stage that trains. Return None if the recipe has no such stage, or loads finished weights for it."""
    section: TrainConfig | None = getattr(chosen, name)
    return None if section is None or getattr(section, "weights", None) is not None else section


def _step_seconds(chosen: Recipe, dataset: Dataset, model: nn.Module, batch: int) -> float:
    """Time training steps (forward, loss, backward) in float32. Return the seconds per image, estimated from the fastest step."""
    samples = [dataset.train[i % len(dataset.train)] for i in range(batch * TIMED_STEPS)]
    on_cpu = chosen.run.device == "cpu"
    taken, started = [], time.perf_counter()
    try:
        model.to("cpu" if on_cpu else f"cuda:{chosen.run.device.split(',')[0]}")
        for loss in losses.losses(model, dataset, samples, max(chosen.data.imgsz_hw), batch):
            loss.backward()
            loss.item()  # waits until the GPU is done
            taken.append(time.perf_counter() - started)
            model.zero_grad(set_to_none=True)
            started = time.perf_counter()
    except torch.OutOfMemoryError as error:
        raise EnvironmentLacks(
            f"out of memory at {batch} images of {max(chosen.data.imgsz_hw)} px: set a lower baseline.batch, prune.batch and "
            "distill.batch, or a lower data.imgsz"
        ) from error
    finally:
        model.cpu()
    return OVERHEAD * min(taken) / batch * (BFLOAT16_STEP if on_cpu and multiplies_bfloat16() else 1.0)
