"""The schedule, augmentation and machine of one training run, in our terms and in Ultralytics'."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


def multiplies_bfloat16() -> bool:
    """Whether the CPU has matrix units for bfloat16 (AMX): a step then takes 0.63 of its time under autocast
    (`benchmarks/trainer_overhead.py --mixed`); elsewhere bfloat16 is emulated, and slower than float32.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return False
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


@dataclass(frozen=True)
class TrainSettings:
    """What one training run needs beyond model, data and hooks; field names are Ultralytics' where it has one."""

    epochs: int
    batch: int
    imgsz_px: int
    seed: int = 0
    optimizer: str = "SGD"
    lr0: float = 0.01
    lrf: float = 0.01
    momentum: float = 0.937
    weight_decay: float = 0.0005
    warmup_epochs: float = 0.0
    cosine: bool = True
    mosaic: float = 1.0
    close_mosaic: int = 0
    scale: float = 0.5
    translate: float = 0.1
    fliplr: float = 0.5
    flipud: float = 0.0
    amp: bool = True
    class_gain: float = 0.5
    freeze: int = 0
    val_every: int = 0
    device: str = "cpu"
    workers: int = 0
    threads: int | None = None

    @property
    def bfloat16(self) -> bool:
        """Whether mixed precision is bfloat16, on a CPU that is made for it."""
        return self.amp and self.device == "cpu" and multiplies_bfloat16()

    def overrides(self, work: Path) -> dict[str, object]:
        """Ultralytics' argument names; the optimizer steps on every batch (`nbs` = `batch`)."""
        return {
            "task": "detect",
            "mode": "train",
            "model": "yolov8n.yaml",  # never built: the trainer is handed the module
            "pretrained": False,
            "epochs": self.epochs,
            "batch": self.batch,
            "nbs": self.batch,
            "imgsz": self.imgsz_px,
            "seed": self.seed,
            "optimizer": self.optimizer,
            "lr0": self.lr0,
            "lrf": self.lrf,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "warmup_epochs": self.warmup_epochs,
            "warmup_bias_lr": 0.0,  # the default of 0.1 throws a trained net's biases away
            "cls": self.class_gain,
            "cos_lr": self.cosine,
            "mosaic": self.mosaic,
            "close_mosaic": self.close_mosaic,
            "scale": self.scale,
            "translate": self.translate,
            "fliplr": self.fliplr,
            "flipud": self.flipud,
            "amp": self.amp and self.device != "cpu",  # on a CPU the trainer asks `bfloat16`
            "device": self.device,
            "workers": self.workers,
            "freeze": self.freeze or None,
            "val": False,
            "plots": False,
            "patience": 0,
            "deterministic": True,
            "save_dir": str(work),
            "project": str(work.parent),
            "name": work.name,
            "exist_ok": True,
        }
