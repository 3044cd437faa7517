"""mAP by Ultralytics' own matching and AP code, on the detections that pycocotools gets too.

A second importer of ultralytics' engine beside `train`, on purpose: the column says what Ultralytics would print for the
same detections, of any backend, and needs its validator's matching, not its training. It differs from pycocotools in that
all 300 detections count, and in how the precision curve is integrated. Boxes are compared in px of the original image,
clipped to it, where the validator uses letterboxed px unclipped; the effect on mAP is below 0.002 (tested).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, TypedDict

import numpy as np

from yolo_compress.errors import DataError
from yolo_compress.evaluate.coco import Truth, absolute_boxes
from yolo_compress.nets.hardening import harden


class UltralyticsAP(TypedDict):
    map50_95: float  # mean over the classes with ground truth, as `map50`
    map50: float
    per_class: dict[str, float | None]  # map50_95 by class name; null without ground truth


def ultralytics_ap(truths: Sequence[Truth], detections: Sequence[np.ndarray], names: Sequence[str]) -> UltralyticsAP:
    """AP as Ultralytics' validator computes it; arguments as in `coco.mean_ap`.

    Raises:
        DataError: no ground truth at all.
        ValueError: a different number of truths and detections.
    """
    harden()
    import torch
    from ultralytics.engine.validator import BaseValidator
    from ultralytics.utils.metrics import ap_per_class, box_iou

    if len(truths) != len(detections):
        raise ValueError(f"{len(truths)} images but {len(detections)} sets of detections")
    if not any(len(truth.boxes) for truth in truths):
        raise DataError(f"no ground truth in {len(truths)} images, mAP is undefined")
    matcher: Any = SimpleNamespace(iouv=torch.linspace(0.5, 0.95, 10))  # all that match_predictions asks of a validator
    correct, labels = [], []
    for truth, found in zip(truths, detections, strict=True):
        actual = torch.from_numpy(absolute_boxes(truth).astype(np.float32))
        predicted = torch.from_numpy(np.asarray(found, np.float32).reshape(-1, 6))
        iou = box_iou(actual[:, 1:], predicted[:, :4])
        correct.append(BaseValidator.match_predictions(matcher, predicted[:, 5], actual[:, 0], iou).numpy())
        labels.append(actual[:, 0].numpy())
    rows_N6 = np.concatenate([np.asarray(found, np.float32).reshape(-1, 6) for found in detections])
    result = ap_per_class(np.concatenate(correct), rows_N6[:, 4], rows_N6[:, 5], np.concatenate(labels))
    ap_KT, classes = result[5], result[6]  # of the classes that have ground truth
    per_class: dict[str, float | None] = dict.fromkeys(names)
    per_class.update({names[int(k)]: float(ap.mean()) for k, ap in zip(classes, ap_KT, strict=True)})
    return {"map50_95": float(ap_KT.mean()), "map50": float(ap_KT[:, 0].mean()), "per_class": per_class}
