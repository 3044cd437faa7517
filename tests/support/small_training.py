"""Trainings of seconds, and what CUDA would change in them, provoked on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.noise_set import noise_set
from yolo_compress.data.dataset import Dataset, load
from yolo_compress.train import checkpoint
from yolo_compress.train.settings import TrainSettings
from yolo_compress.train.trainer import HookedTrainer

NAMES = ["bolt", "nut"]


class Stopped(Exception):
    """Ends a training as a kill would, after something was saved."""


def small_set(root: Path, train: int = 6, names: Sequence[str] = NAMES) -> Dataset:
    return load(str(noise_set(root, train=train, val=2, names=names)))


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**({"epochs": 2, "batch": 3, "imgsz_px": 64, "optimizer": "AdamW", "lr0": 1e-3} | changes))


def model(seed: int = 0) -> nn.Module:
    return checkpoint.new_model("yolov8n.yaml", NAMES, 3, seed)


def stop_after_save(patch: pytest.MonkeyPatch) -> None:
    """The next training ends after its first epoch was saved."""
    save = HookedTrainer.save_model

    def stopping(trainer: HookedTrainer) -> bool:
        save(trainer)
        raise Stopped

    patch.setattr(HookedTrainer, "save_model", stopping)


def as_on_cuda(patch: pytest.MonkeyPatch) -> None:
    """channels_last, and a scaler of gradients that works, in every training from here on."""
    scaler, setup = torch.amp.GradScaler, HookedTrainer.setup_model

    def channels_last(trainer: HookedTrainer) -> None:
        setup(trainer)
        trainer.model = trainer.model.to(memory_format=torch.channels_last)

    patch.setattr(HookedTrainer, "setup_model", channels_last)
    patch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler("cpu", enabled=True))
