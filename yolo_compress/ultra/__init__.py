"""The only door to ultralytics' engine: checkpoints in and out, one training loop with hooks, its own validator."""

import logging

from yolo_compress.hardening import harden

harden()

from yolo_compress.ultra.checkpoint import check_classes, image_channels, load_model, new_model, save_model, widths  # noqa: E402
from yolo_compress.ultra.losses import losses  # noqa: E402
from yolo_compress.ultra.settings import TrainSettings  # noqa: E402
from yolo_compress.ultra.trainer import train  # noqa: E402
from yolo_compress.ultra.validate import validate  # noqa: E402

logging.getLogger("ultralytics").setLevel(logging.WARNING)

__all__ = [
    "TrainSettings",
    "check_classes",
    "image_channels",
    "load_model",
    "losses",
    "new_model",
    "save_model",
    "train",
    "validate",
    "widths",
]
