"""Measure the loss or the mAP of a model on chosen images, for a sensitivity analysis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from yolo_compress.data.dataset import Sample
from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.stages import Job
from yolo_compress.stages._training import device
from yolo_compress.train import losses


@torch.no_grad()
def loss(job: Job, samples: Sequence[Sample], model: nn.Module) -> float:
    """Return the mean detection loss of the model over the images in `samples`. Lower is better."""
    values = losses.losses(model, job.dataset, samples, max(job.imgsz_hw))
    return float(torch.stack(list(values)).mean())


def map50_95(job: Job, samples: Sequence[Sample], model: nn.Module) -> float:
    """Return the model's mAP50-95 on the images in `samples`. Higher is better."""
    names, size = job.dataset.names, job.imgsz_hw
    with TorchBackend(model, names, size, device=device(job)) as backend:
        return float(accuracy(backend, list(samples), names, size, max_det=job.recipe.data.max_det)["map50_95"])


MEASURES: dict[str, Callable[[Job, Sequence[Sample], nn.Module], float]] = {"loss": loss, "map50_95": map50_95}
