"""Settings of one training run: schedule, augmentation and machine, and their names in Ultralytics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from yolo_compress import ranks
from yolo_compress.store.resources import data_workers


def multiplies_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16: with AMX, or with AVX512_BF16 as AMD has it from Zen 4 on.

    A training step then takes 0.6 to 0.7 of the time of float32 (`benchmarks/trainer_overhead.py --mixed`). On other CPUs, bfloat16
    is emulated and slower than float32.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run. If a setting also exists in Ultralytics, it has the same name there."""

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
    workers: int | None = 0  # None: see `resources.data_workers`
    threads: int | None = None

    @property
    def bfloat16(self) -> bool:
        """Whether to train with bfloat16 autocast: `amp` is on and the device is a CPU that multiplies bfloat16."""
        return self.amp and self.device == "cpu" and multiplies_bfloat16()

    def overrides(self, work: Path) -> dict[str, object]:
        """Return the settings under the names of Ultralytics. `nbs` equals `batch`, so the optimizer steps on every batch."""
        return {
            "task": "detect",
            "mode": "train",
            "model": "yolov8n.yaml",  # never built: the trainer gets the module
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
            "warmup_bias_lr": 0.0,  # the default of 0.1 destroys the biases of a trained model
            "cls": self.class_gain,
            "cos_lr": self.cosine,
            "mosaic": self.mosaic,
            "close_mosaic": self.close_mosaic,
            "scale": self.scale,
            "translate": self.translate,
            "fliplr": self.fliplr,
            "flipud": self.flipud,
            "amp": self.amp and self.device != "cpu",  # on a CPU the trainer uses `bfloat16`
            "device": self.device,
            "workers": data_workers(self.device, self.workers, self.batch // ranks.world(), self.imgsz_px),
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
