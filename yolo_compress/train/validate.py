"""Validate with Ultralytics' own validator, on data that passed the preflight. This gives the mAP of `yolo val`.

It is compared with the mAP by pycocotools.
"""

from __future__ import annotations

import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionValidator

from yolo_compress.data.dataset import Dataset
from yolo_compress.nets import detect
from yolo_compress.train.dataset import PreflightDataset


def validate(
    model: nn.Module, dataset: Dataset, imgsz_px: int, *, batch: int = 16, rect: bool = False
) -> dict[str, float]:
    """Return `map50_95` and `map50` of a float model, computed by Ultralytics on the CPU.

    Args:
        model: Stock detector. A copy is validated. Of an end-to-end head, the one-to-one branches are validated, without NMS.
        dataset: Data set whose validation images are used.
        imgsz_px: Long side of the letterbox.
        rect: True: rectangular batches, the default of `yolo val`. False: square letterboxes, as for an exported model.
    """
    args = get_cfg(
        overrides={"task": "detect", "mode": "val", "imgsz": imgsz_px, "batch": batch, "plots": False, "rect": rect}
    )
    data = {
        "val": "val",
        "names": dict(enumerate(dataset.names)),
        "nc": len(dataset.names),
        "channels": dataset.channels,
    }
    samples = PreflightDataset(
        dataset.val, cache=False, imgsz=imgsz_px, batch_size=batch, augment=False, hyp=args, rect=rect, stride=32,
        pad=0.5, data=data,
    )  # fmt: skip
    loader = DataLoader(samples, batch_size=batch, collate_fn=samples.collate_fn)
    with tempfile.TemporaryDirectory() as scratch:
        validator = _Validator(loader, save_dir=Path(scratch), args=args)
        validator.dataset_dict = data
        return validator.measure(deepcopy(model).float().cpu().eval())


class _Validator(DetectionValidator):
    """Ultralytics' DetectionValidator, changed to use an existing data loader, without AutoBackend and data checks."""

    dataset_dict: dict

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        self.training = True  # skips the check of the data yaml
        self.data, self.device = self.dataset_dict, torch.device("cpu")
        self.args.conf = 0.001
        model.end2end = not detect.needs_nms(model)  # type: ignore[assignment]
        self.init_metrics(model)
        for batch in self.dataloader:
            batch = self.preprocess(batch)
            self.update_metrics(self.postprocess(model(batch["img"])), batch)
        results = self.get_stats()
        return {"map50_95": float(results["metrics/mAP50-95(B)"]), "map50": float(results["metrics/mAP50(B)"])}
