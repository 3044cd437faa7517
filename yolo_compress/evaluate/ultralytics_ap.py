"""mAP by Ultralytics' own matching and AP code, on the same detections as pycocotools.

The stage `bench` shows this mAP so that users can compare it with the output of Ultralytics. The matching is a method of
Ultralytics' validator. Only this module and `train` import Ultralytics' engine. Two things differ from pycocotools: all 300
detections count, and the precision curve is integrated in another way. Boxes are compared in px of the source image, clipped to it.
The validator uses letterboxed px without clipping. The effect of this on mAP is below 0.002 (tested).
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
    """Compute the AP as Ultralytics' validator does. For the arguments see `coco.mean_ap`.

    Raises:
        DataError: there is no ground truth.
        ValueError: `truths` and `detections` have different lengths.
    """
    harden()
    import torch
    from ultralytics.engine.validator import BaseValidator
    from ultralytics.utils.metrics import ap_per_class, box_iou

    if len(truths) != len(detections):
        raise ValueError(f"{len(truths)} images but {len(detections)} sets of detections")
    if not any(len(truth.boxes) for truth in truths):
        raise DataError(f"no ground truth in {len(truths)} images, mAP is undefined")
    matcher: Any = SimpleNamespace(iouv=torch.linspace(0.5, 0.95, 10))  # the only attribute that match_predictions uses
    correct, labels = [], []
    for truth, found in zip(truths, detections, strict=True):
        actual = torch.from_numpy(absolute_boxes(truth).astype(np.float32))
        predicted = torch.from_numpy(np.asarray(found, np.float32).reshape(-1, 6))
        iou = box_iou(actual[:, 1:], predicted[:, :4])
        correct.append(BaseValidator.match_predictions(matcher, predicted[:, 5], actual[:, 0], iou).numpy())
        labels.append(actual[:, 0].numpy())
    rows_N6 = np.concatenate([np.asarray(found, np.float32).reshape(-1, 6) for found in detections])
    result = ap_per_class(np.concatenate(correct), rows_N6[:, 4], rows_N6[:, 5], np.concatenate(labels))
    ap_KT, classes = result[5], result[6]  # AP and indices of the classes that have ground truth
    per_class: dict[str, float | None] = dict.fromkeys(names)
    per_class.update({names[int(k)]: float(ap.mean()) for k, ap in zip(classes, ap_KT, strict=True)})
    return {"map50_95": float(ap_KT.mean()), "map50": float(ap_KT[:, 0].mean()), "per_class": per_class}
