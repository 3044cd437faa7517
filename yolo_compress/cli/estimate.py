"""Estimate how long the stages of a recipe will train on this machine, from a few timed training steps."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import nn

from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import EnvironmentLacks
from yolo_compress.prune.cost import conv_macs
from yolo_compress.recipe.recipe import Recipe, TrainConfig
from yolo_compress.train import losses
from yolo_compress.train.settings import multiplies_bfloat16

TIMED_STEPS = 2
FORWARD = 1 / 3  # of a training step: the cost of a teacher's forward pass, or of validating one image
PRUNED_STEP = 0.65  # a step of a model with half of the MACs, as a share of the baseline's step
OVERHEAD = 1.45  # augmentation, optimizer and EMA beside the step: 4.6 against 3.2 s an epoch (YOLOv8n, 55 images, 320 px, 2 cores)
BFLOAT16_STEP = 0.63  # of a step in float32 (benchmarks/trainer_overhead.py --mixed)


def seconds(chosen: Recipe, dataset: Dataset, models: Mapping[str, nn.Module]) -> dict[str, float]:
    """Estimate the seconds of each stage that will train.

    Args:
        chosen: The recipe, without `auto`.
        dataset: Its data set.
        models: `baseline`, and `teacher` where the recipe has one, before any training.

    Raises:
        EnvironmentLacks: A batch does not fit into memory.
    """
    macs = {name: conv_macs(model, chosen.data.imgsz_hw) for name, model in models.items()}
    teacher = macs.get("teacher", macs["baseline"]) / macs["baseline"]
    relative = {  # to a training step of the baseline
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
    image = _step_seconds(chosen, dataset, models["baseline"], max(int(section.batch) for section in trained.values()))
    found, every = {}, chosen.run.val_every
    for name, section in trained.items():
        epochs = int(section.epochs)
        validated = len(dataset.val) * (1 + (epochs // every if every else 0)) * FORWARD
        found[name] = image * relative[name] * (epochs * len(dataset.train) + validated)
    return found


def _trained(chosen: Recipe, name: str) -> TrainConfig | None:
    section: TrainConfig | None = getattr(chosen, name)
    return None if section is None or getattr(section, "weights", None) is not None else section


def _step_seconds(chosen: Recipe, dataset: Dataset, model: nn.Module, batch: int) -> float:
    """Time training steps (forward, loss, backward) in float32; returns the seconds per image of the fastest."""
    samples = [dataset.train[i % len(dataset.train)] for i in range(batch * TIMED_STEPS)]
    on_cpu = chosen.run.device == "cpu"
    taken, started = [], time.perf_counter()
    try:
        model.to("cpu" if on_cpu else f"cuda:{chosen.run.device.split(',')[0]}")
        for loss in losses.losses(model, dataset, samples, max(chosen.data.imgsz_hw), batch):
            loss.backward()
            loss.item()  # waits for a GPU
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
