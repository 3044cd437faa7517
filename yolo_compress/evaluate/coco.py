"""mAP by pycocotools. No other module uses pycocotools.

pycocotools integrates the precision. The matching is that of `runtime.measure.coco_map`, which finds the same matches in arrays:
pycocotools needs six times as long, because it has a dictionary for each detection.

Shape suffixes: N detections; a row is (x1, y1, x2, y2, score, class) in px of the source image. In pycocotools' precision array:
T IoU thresholds, R recall points, K classes, A area ranges, M detection limits.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from yolo_compress.errors import DataError
from yolo_compress.runtime.max_detections import MAX_DETECTIONS
from yolo_compress.runtime.measure.coco_map import Matches, MeanAP, match


class Truth(Protocol):
    """Ground truth of an image; `data.samples.Sample` implements it.

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
    boxes = [absolute_boxes(truth) for truth in truths]
    labels = np.concatenate([rows_N5[:, 0] for rows_N5 in boxes]).astype(np.int64) if boxes else np.zeros(0, np.int64)
    if not len(labels):
        raise DataError(f"no ground truth in {len(truths)} images, mAP is undefined")
    if labels.min() < 0 or labels.max() >= len(names):
        raise DataError(f"ground truth of classes {np.unique(labels).tolist()}, but there are {len(names)} names")
    count_K = np.bincount(labels, minlength=len(names))
    precision_TRK = _precision(match(boxes, detections, len(names), ("all",), most))
    ap_TK = np.where(precision_TRK > -1, precision_TRK, np.nan).mean(axis=1)  # -1 marks classes without ground truth
    present_K = np.flatnonzero(count_K)
    return {
        "map50_95": float(ap_TK[:, present_K].mean()),
        "map50": float(ap_TK[0, present_K].mean()),
        "per_class": {name: float(ap_TK[:, k].mean()) if count_K[k] else None for k, name in enumerate(names)},
        "per_class_50": {name: float(ap_TK[0, k]) if count_K[k] else None for k, name in enumerate(names)},
        "counts": {name: int(count_K[k]) for k, name in enumerate(names)},
    }


def _precision(matches: Matches) -> np.ndarray:
    """Return COCOeval's precision_TRK over all areas.

    COCOeval gets the matches of each class as if they were in one image: the order of the detections is the same.
    """
    from pycocotools.cocoeval import COCOeval

    evaluation = COCOeval(iouType="bbox")
    wanted = evaluation.params
    wanted.imgIds, wanted.catIds = [0], list(range(matches.classes))
    wanted.areaRng, wanted.areaRngLbl = wanted.areaRng[:1], ["all"]
    wanted.maxDets = [max(len(matches.score_D), 1)]  # `match` has applied the limit
    evaluation._paramsEval = wanted
    evaluation.evalImgs = []
    for k in range(matches.classes):
        here = matches.of_class(k)
        evaluation.evalImgs.append(
            {
                "dtScores": matches.score_D[here],
                "dtMatches": matches.truth_ATD[0, :, here] >= 0,
                "dtIgnore": ~matches.counts_ATD[0, :, here],
                "gtIgnore": ~matches.counted_AN[0, matches.class_N == k],
            }
        )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
