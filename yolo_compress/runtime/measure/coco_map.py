"""COCO's matching of detections to ground truth, and its average precision, with numpy only. The results equal pycocotools.

A "truth" here is a ground-truth box: a row (class, x1, y1, x2, y2). A detection is a row (x1, y1, x2, y2, score, class). Both are in
px of the image. Shape suffixes: N truths, D detections that count, T IoU thresholds, A area ranges, K classes, R recall points.
"""

from __future__ import annotations

from collections import Counter
from typing import Dict, NamedTuple, Optional, Sequence, Tuple, TypedDict

import numpy as np

from ..max_detections import MAX_DETECTIONS

IOUS_T = np.linspace(0.5, 0.95, 10)
RECALLS_R = np.linspace(0.0, 1.0, 101)
AREAS: Dict[str, Tuple[float, float]] = {  # px^2 of the source image, limits included
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
_ALMOST_ONE = 1 - 1e-10  # as COCO: with a threshold of 1, a perfect box still matches
EPSILON = np.spacing(1)  # as COCO: the precision without detections is 0


class Matches(NamedTuple):
    """The ground-truth box that each detection matches, for every IoU threshold and area range.

    Detections are sorted by class, then by falling score. Equal scores are in the order of images and rows. Ground-truth boxes are
    in the order of the input.

    Attributes:
        image_D, row_D: image of each detection, and its row in that image.
        truth_ATD: index of the matched ground-truth box; -1: the detection matches no box.
        counts_ATD: whether the detection counts as right or wrong. A matched detection does not count if the ground-truth box is
            outside the area range. An unmatched detection does not count if the detection is outside the area range.
        image_N, class_N: image and class of each ground-truth box.
        counted_AN: whether the ground-truth box is inside the area range.
        images, classes: number of images and classes.
        areas: names of the area ranges.
    """

    image_D: np.ndarray
    row_D: np.ndarray
    class_D: np.ndarray
    score_D: np.ndarray
    truth_ATD: np.ndarray
    counts_ATD: np.ndarray
    image_N: np.ndarray
    class_N: np.ndarray
    counted_AN: np.ndarray
    images: int
    classes: int
    areas: Tuple[str, ...]

    def of_class(self, k: int) -> slice:
        """Return the slice of the detections of class `k`."""
        start, stop = np.searchsorted(self.class_D, [k, k + 1])
        return slice(int(start), int(stop))


def match(
    truths: Sequence[np.ndarray],
    detections: Sequence[np.ndarray],
    classes: int,
    areas: Sequence[str] = tuple(AREAS),
    most: int = MAX_DETECTIONS,
) -> Matches:
    """Match detections to ground-truth boxes as COCOeval does.

    In each image and class, detections are processed by falling score. Each detection takes the free ground-truth box with the
    highest IoU. A box that an earlier detection took is not free.

    Args:
        truths: ground-truth boxes, one array of rows (class, x1, y1, x2, y2) per image.
        detections: one array of rows (x1, y1, x2, y2, score, class) per image, in the same order.
        classes: number of classes. Labels are 0 to classes - 1. Detections with other labels do not count.
        areas: keys of `AREAS`.
        most: largest number of detections per class and image that count. The best are taken.

    Raises:
        ValueError: `truths` and `detections` have different lengths, or the class of a ground-truth box is out of range.
    """
    if len(truths) != len(detections):
        raise ValueError(f"{len(truths)} images but {len(detections)} sets of detections")
    truth_N5, image_N, _ = _flat(truths, 5)
    found_D6, image_D, row_D = _flat(detections, 6)
    class_N = truth_N5[:, 0].astype(np.int64)
    if len(class_N) and (class_N.min() < 0 or class_N.max() >= classes):
        raise ValueError(f"truths of classes {class_N.min()} to {class_N.max()}, expected 0 to {classes - 1}")
    class_D = found_D6[:, 5].astype(np.int64)
    order = np.lexsort((-found_D6[:, 4], class_D, image_D))  # stable, like COCO's mergesort
    order = order[(class_D[order] >= 0) & (class_D[order] < classes)]
    group_D, group_N = image_D * classes + class_D, image_N * classes + class_N
    order = order[_rank(group_D[order]) < most]
    found_D6, image_D, row_D, class_D, group_D = (part[order] for part in (found_D6, image_D, row_D, class_D, group_D))

    truth_D4, truth_N4 = sized(found_D6[:, :4]), sized(truth_N5[:, 1:])
    inside_AD, inside_AN = _inside(truth_D4, areas), _inside(truth_N4, areas)
    truth_ATD = np.full((len(areas), len(IOUS_T), len(order)), -1, np.int32)
    by_group = np.argsort(group_N, kind="stable")
    groups, first = np.unique(group_N[by_group], return_index=True)
    last = np.append(first[1:], len(by_group))
    starts, stops = (np.searchsorted(group_D, groups, side) for side in ("left", "right"))
    for g in range(len(groups)):
        if starts[g] < stops[g]:
            here, those = slice(int(starts[g]), int(stops[g])), by_group[first[g] : last[g]]
            _match_group(truth_D4[here], truth_N4[those], inside_AN[:, those], those, truth_ATD[:, :, here])

    if len(truth_N5):
        counts_ATD = np.take_along_axis(inside_AN[:, None], np.maximum(truth_ATD, 0), axis=2)
        counts_ATD = np.where(truth_ATD >= 0, counts_ATD, inside_AD[:, None])
    else:
        counts_ATD = np.repeat(inside_AD[:, None], len(IOUS_T), axis=1)
    final = np.lexsort((-found_D6[:, 4], class_D))
    return Matches(
        image_D[final], row_D[final], class_D[final], found_D6[final, 4], truth_ATD[:, :, final], counts_ATD[:, :, final],
        image_N, class_N, inside_AN, len(truths), classes, tuple(areas),
    )  # fmt: skip


def _flat(rows: Sequence[np.ndarray], width: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Concatenate the rows of all images as float64. Return the rows, the image of each row, and the row's index in the image."""
    parts = [np.asarray(part, np.float64).reshape(-1, width) for part in rows]
    lengths = [len(part) for part in parts]
    image = np.repeat(np.arange(len(parts), dtype=np.int64), lengths)
    number = np.concatenate([np.arange(n) for n in lengths]) if parts else np.zeros(0, np.int64)
    return np.concatenate(parts) if parts else np.zeros((0, width)), image, number


def counting(rows_N6: np.ndarray, most: int = MAX_DETECTIONS) -> np.ndarray:
    """Return a mask of the detections in one image that mAP counts: the best `most` of each class."""
    order = np.lexsort((-rows_N6[:, 4], rows_N6[:, 5]))
    mask = np.zeros(len(rows_N6), bool)
    mask[order[_rank(rows_N6[order, 5]) < most]] = True
    return mask


def _rank(group_D: np.ndarray) -> np.ndarray:
    """Return the position of each element in its run of equal values."""
    starts = np.flatnonzero(np.diff(group_D, prepend=-1))
    return np.arange(len(group_D)) - np.repeat(starts, np.diff(np.append(starts, len(group_D))))


def sized(boxes_N4: np.ndarray) -> np.ndarray:
    """Convert xyxy boxes to x, y, width, height, with the same rounding as COCO."""
    return np.concatenate([boxes_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]], axis=1)


def _inside(boxes_N4: np.ndarray, areas: Sequence[str]) -> np.ndarray:
    area_N = boxes_N4[:, 2] * boxes_N4[:, 3]
    return np.stack([(area_N >= AREAS[name][0]) & (area_N <= AREAS[name][1]) for name in areas])


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU of boxes (..., 4) x, y, width, height, with broadcasting. The operations have the order of pycocotools."""
    width = np.minimum(a[..., 2] + a[..., 0], b[..., 2] + b[..., 0]) - np.maximum(a[..., 0], b[..., 0])
    height = np.minimum(a[..., 3] + a[..., 1], b[..., 3] + b[..., 1]) - np.maximum(a[..., 1], b[..., 1])
    over = (width > 0) & (height > 0)
    inter = np.where(over, width * height, 0.0)
    union = a[..., 2] * a[..., 3] + b[..., 2] * b[..., 3] - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=over)


def _match_group(
    found_D4: np.ndarray, truth_G4: np.ndarray, inside_AG: np.ndarray, index_G: np.ndarray, out_ATD: np.ndarray
) -> None:
    """Match one class in one image for all area ranges and IoU thresholds. Write the index of each matched box into `out_ATD`.

    A ground-truth box outside the area range is matched only if all boxes inside the range are taken. If two boxes have the same
    IoU, the last one is matched, as in COCO.
    """
    iou_DG = box_iou(found_D4[:, None], truth_G4[None])
    bounds_T = np.minimum(IOUS_T, _ALMOST_ONE)
    count = len(index_G)
    free_ATG = np.ones((len(inside_AG), len(bounds_T), count), bool)
    bonus_A1G = (inside_AG * count)[:, None]
    for d in np.flatnonzero(iou_DG.max(axis=1) >= bounds_T[0]):
        iou_G = iou_DG[d]
        rank_G = np.empty(count, np.int64)
        rank_G[np.argsort(iou_G, kind="stable")] = np.arange(1, count + 1)
        value_ATG = np.where(free_ATG & (iou_G >= bounds_T[:, None]), rank_G + bonus_A1G, 0)
        best_AT = value_ATG.argmax(axis=2)
        a, t = np.nonzero(np.take_along_axis(value_ATG, best_AT[..., None], axis=2)[..., 0])
        best = best_AT[a, t]
        free_ATG[a, t, best] = False
        out_ATD[a, t, d] = index_G[best]


def precision(matches: Matches, area: str = "all") -> np.ndarray:
    """Return COCOeval's precision_TRK: the best precision at this or a higher recall. NaN: the class has no ground-truth box."""
    a = matches.areas.index(area)
    truths_K = np.bincount(matches.class_N[matches.counted_AN[a]], minlength=matches.classes)
    out_TRK = np.full((len(IOUS_T), len(RECALLS_R), matches.classes), np.nan)
    for k in np.flatnonzero(truths_K):
        here = matches.of_class(int(k))
        right_TD = (matches.truth_ATD[a, :, here] >= 0) & matches.counts_ATD[a, :, here]
        counted_TD = matches.counts_ATD[a, :, here]
        for t in range(len(IOUS_T)):
            out_TRK[t, :, k] = _curve(right_TD[t], counted_TD[t], int(truths_K[k]))
    return out_TRK


def _curve(right_D: np.ndarray, counted_D: np.ndarray, truths: int) -> np.ndarray:
    found_D = np.cumsum(right_D).astype(np.float64)
    wrong_D = np.cumsum(counted_D & ~right_D).astype(np.float64)
    precision_D = found_D / (wrong_D + found_D + EPSILON)
    best_D = np.maximum.accumulate(precision_D[::-1])[::-1]
    return np.append(best_D, 0.0)[np.searchsorted(found_D / truths, RECALLS_R, side="left")]


class MeanAP(TypedDict):
    """COCO's box AP, a fraction from 0 to 1. Null: the class has no ground truth."""

    map50_95: float  # mean over the classes with ground truth, IoU 0.5 to 0.95
    map50: float  # the same at IoU 0.5
    per_class: Dict[str, Optional[float]]  # class name -> AP, IoU 0.5 to 0.95
    per_class_50: Dict[str, Optional[float]]
    counts: Dict[str, int]  # class name -> boxes of the ground truth


def mean_ap(
    truths: Sequence[np.ndarray], detections: Sequence[np.ndarray], names: Sequence[str], most: int = MAX_DETECTIONS
) -> MeanAP:
    """Compute COCO's box AP over all areas. If there are no detections, the AP is 0.0.

    Args:
        truths: ground-truth boxes, one array of rows (class, x1, y1, x2, y2) in px per image.
        detections: one array of rows (x1, y1, x2, y2, score, class) per image, in the same order.
        names: class names in the order of their index, all different.
        most: largest number of detections per class and image that count. The best are taken.

    Raises:
        ValueError: there is no ground truth, class names repeat, or `match` rejects the input.
    """
    if len(set(names)) != len(names):
        raise ValueError(f"class names repeat: {sorted(name for name, n in Counter(names).items() if n > 1)}")
    matches = match(truths, detections, len(names), ("all",), most)
    count_K = np.bincount(matches.class_N, minlength=len(names))
    if not count_K.any():
        raise ValueError(f"no ground truth in {len(truths)} images, mAP is undefined")
    ap_TK = precision(matches).mean(axis=1)
    present_K = np.flatnonzero(count_K)
    present = [(name, k, bool(count_K[k])) for k, name in enumerate(names)]
    return {
        "map50_95": float(ap_TK[:, present_K].mean()),
        "map50": float(ap_TK[0, present_K].mean()),
        "per_class": {name: float(ap_TK[:, k].mean()) if there else None for name, k, there in present},
        "per_class_50": {name: float(ap_TK[0, k]) if there else None for name, k, there in present},
        "counts": {name: int(count_K[k]) for name, k, _ in present},
    }
