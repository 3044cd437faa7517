"""mAP by pycocotools. No other module uses pycocotools.

Shape suffixes: N detections; a row is (x1, y1, x2, y2, score, class) in px of the source image. In pycocotools' precision array:
T IoU thresholds, R recall points, K classes, A area ranges, M detection limits.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from yolo_compress.errors import DataError
from yolo_compress.runtime.max_detections import MAX_DETECTIONS
from yolo_compress.runtime.measure.coco_map import MeanAP


class Truth(Protocol):
    """Ground truth of an image; `data.reader.Sample` implements it.

    `boxes` are (class, centre x, centre y, width, height), as fractions of the image. `width` and `height` are in px.
    """

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def boxes(self) -> tuple[tuple[int, float, float, float, float], ...]: ...


def absolute_boxes(truth: Truth) -> np.ndarray:
    """Return boxes_N5 (class, x1, y1, x2, y2) in px of the image."""
    boxes_N5 = np.array(truth.boxes, np.float64).reshape(-1, 5)
    size_4 = np.array([truth.width, truth.height, truth.width, truth.height], np.float64)
    half_N2 = boxes_N5[:, 3:5] / 2
    corners_N4 = np.concatenate([boxes_N5[:, 1:3] - half_N2, boxes_N5[:, 1:3] + half_N2], axis=1)
    return np.concatenate([boxes_N5[:, :1], corners_N4 * size_4], axis=1)


def mean_ap(
    truths: Sequence[Truth], detections: Sequence[np.ndarray], names: Sequence[str], most: int = MAX_DETECTIONS
) -> MeanAP:
    """Compute COCO's box AP over all areas. If there are no detections, the AP is 0.0.

    Args:
        truths: ground truth of each image.
        detections: one N6 array per image (x1, y1, x2, y2, score, class), in the same order.
        names: class names in the order of their index, all different.
        most: limit of detections per class and image. Those with the highest scores count.

    Raises:
        DataError: there is no ground truth, class names repeat, or a class is out of range.
        ValueError: `truths` and `detections` have different lengths.
    """
    if len(truths) != len(detections):
        raise ValueError(f"{len(truths)} images but {len(detections)} sets of detections")
    if len(set(names)) != len(names):
        raise DataError(f"class names repeat: {sorted(name for name, n in Counter(names).items() if n > 1)}")
    counted = Counter(int(box[0]) for truth in truths for box in truth.boxes)
    if not counted:
        raise DataError(f"no ground truth in {len(truths)} images, mAP is undefined")
    if min(counted) < 0 or max(counted) >= len(names):
        raise DataError(f"ground truth of classes {sorted(counted)}, but there are {len(names)} names")
    precision_TRK = _precision(truths, detections, len(names), most)
    ap_TK = np.where(precision_TRK > -1, precision_TRK, np.nan).mean(axis=1)  # -1 marks classes without ground truth
    present_K = [k for k in range(len(names)) if counted[k]]
    return {
        "map50_95": float(ap_TK[:, present_K].mean()),
        "map50": float(ap_TK[0, present_K].mean()),
        "per_class": {name: float(ap_TK[:, k].mean()) if counted[k] else None for k, name in enumerate(names)},
        "per_class_50": {name: float(ap_TK[0, k]) if counted[k] else None for k, name in enumerate(names)},
        "counts": {name: counted[k] for k, name in enumerate(names)},
    }


def _precision(truths: Sequence[Truth], detections: Sequence[np.ndarray], classes: int, most: int) -> np.ndarray:
    """Return COCOeval's precision_TRK over all areas. COCOeval's output on stdout is suppressed."""
    from pycocotools.cocoeval import COCOeval

    boxes = [absolute_boxes(truth) for truth in truths]
    actual = [np.insert(b[:, 1:5], 4, 1.0, axis=1) for b in boxes]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco([np.insert(a, 5, b[:, 0], axis=1) for a, b in zip(actual, boxes, strict=True)], classes)
        evaluation = COCOeval(truth, _coco(detections, classes), "bbox")
        evaluation.params.maxDets = [1, 10, most]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]


def _coco(rows: Sequence[np.ndarray], classes: int) -> Any:
    """Make a COCO object from the rows (xyxy, score, class) of each image."""
    from pycocotools.coco import COCO

    annotations: list[dict[str, object]] = []
    for image, boxes_N6 in enumerate(rows):
        for x1, y1, x2, y2, score, label in np.asarray(boxes_N6, np.float64).reshape(-1, 6).tolist():
            annotations.append(
                {
                    "id": len(annotations) + 1,  # 0 means "unmatched" in COCOeval
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "score": score,
                }
            )
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(len(rows))],
        "categories": [{"id": k} for k in range(classes)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco
