"""The only door to ultralytics' engine: checkpoints in and out, one training loop with hooks, its own validator."""

import logging

from yolo_compress.hardening import harden

harden()

from yolo_compress.ultra.checkpoint import (  # noqa: E402
    check_classes,
    class_names,
    image_channels,
    load_model,
    new_model,
    save_model,
    widths,
)
from yolo_compress.ultra.losses import losses  # noqa: E402
from yolo_compress.ultra.settings import TrainSettings  # noqa: E402
from yolo_compress.ultra.trainer import train  # noqa: E402
from yolo_compress.ultra.transfer import Taken, load_pretrained  # noqa: E402
from yolo_compress.ultra.validate import validate  # noqa: E402

logging.getLogger("ultralytics").setLevel(logging.WARNING)

__all__ = [
    "Taken",
    "TrainSettings",
    "check_classes",
    "class_names",
    "image_channels",
    "load_model",
    "load_pretrained",
    "losses",
    "new_model",
    "save_model",
    "train",
    "validate",
    "widths",
]
