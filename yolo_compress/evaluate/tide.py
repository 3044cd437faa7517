"""TIDE's six types of detection errors (Bolya et al., arXiv 2008.08115), and the cost of each type in AP50.

"Truth" below and in the code is a ground-truth box. A detection that matched no truth has the first of these types that applies, in
the order of `tidecv`. The IoU is measured between the detection and the truths of the same image.

    localisation    right class, IoU from 0.1 to 0.5
    classification  another class, IoU from 0.5
    duplicate       right class, IoU from 0.5, but a better detection matched this truth
    background      IoU up to 0.1 with every truth
    both            all others: another class and a poor box

A truth has the type `missed` if no detection matched it, and if no corrected localisation or classification error would match it.

The cost of a type is the increase of AP50 if only the errors of this type were corrected:

- For each truth without a match, the localisation or classification error with the highest score becomes right. Other errors of
  these two types are removed.
- Errors of the types `duplicate`, `background` and `both` are removed.
- A missed truth no longer counts.

The costs do not add up to 1 - AP50, because one error can hide another.

Shape suffixes: N detections in an image, G truths in an image, D all detections, T all truths, K classes, R recall points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from typing_extensions import TypedDict

from yolo_compress.errors import DataError
from yolo_compress.runtime.max_detections import MAX_DETECTIONS
from yolo_compress.runtime.measure.coco_map import RECALLS_R

TYPES = ("classification", "localisation", "both", "duplicate", "background", "missed")
FOREGROUND, BACKGROUND = 0.5, 0.1  # the paper's t_f and t_b
RIGHT = -1  # the type of a detection that matched
CLS, LOC, BOTH, DUP, BKG = range(5)


class ErrorSum(TypedDict):
    count: int
    cost: float  # increase of AP50 if these errors were corrected, at least 0


class ErrorType(ErrorSum):
    name: str  # one of `TYPES`


class ModelErrors(TypedDict):
    """Number and cost in AP50 of each type of error in one model's detections."""

    ap50: float  # a fraction, mean over the classes with objects
    truths: int  # objects
    detections: int
    types: list[ErrorType]  # in the order of `TYPES`
    false_positives: ErrorSum  # all false detections
    false_negatives: ErrorSum  # all objects not found


class _Judged(NamedTuple):
    """All detections with their error types, and all ground-truth boxes.

    `target_D` is the index of the unmatched ground-truth box that the detection would match after correction; -1: none.
    """

    score_D: np.ndarray
    class_D: np.ndarray
    type_D: np.ndarray
    target_D: np.ndarray
    class_T: np.ndarray
    matched_T: np.ndarray


def errors(truths: Sequence[np.ndarray], detections: Sequence[np.ndarray], most: int = MAX_DETECTIONS) -> ModelErrors:
    """Count the detection errors of each TIDE type, and compute the cost of each type in AP50.

    Args:
        truths: ground-truth boxes, one G5 array per image: class, x1, y1, x2, y2 in px.
        detections: one N6 array per image, in the same order: x1, y1, x2, y2, score, class.
        most: largest number of detections per image that count. The best are taken.

    Raises:
        DataError: there is no ground-truth box.
        ValueError: `truths` and `detections` have different lengths.
    """
    if len(truths) != len(detections):
        raise ValueError(f"{len(truths)} images but {len(detections)} sets of detections")
    if not sum(map(len, truths)):
        raise DataError(f"no ground truth in {len(truths)} images, errors have no meaning")
    found = _judge(truths, detections, most)
    best_D = _best_of_each_truth(found)
    hopeless_T = ~found.matched_T
    hopeless_T[found.target_D[found.target_D >= 0]] = False
    right_D = found.type_D == RIGHT
    base = _ap(found.score_D, found.class_D, right_D, found.class_T)

    def cost(score_D: np.ndarray, class_D: np.ndarray, right_D: np.ndarray, class_T: np.ndarray) -> float:
        return max(0.0, _ap(score_D, class_D, right_D, class_T, found.class_T) - base)

    types: list[ErrorType] = []
    for number, name in enumerate(TYPES[:-1]):
        of_type_D = found.type_D == number
        corrected_D = of_type_D & best_D  # all false for the types that are only removed
        keep_D = ~of_type_D | corrected_D
        class_D = np.where(corrected_D, found.class_T[found.target_D], found.class_D)
        type_cost = cost(found.score_D[keep_D], class_D[keep_D], (right_D | corrected_D)[keep_D], found.class_T)
        types.append({"name": name, "count": int(of_type_D.sum()), "cost": type_cost})
    missed_cost = cost(found.score_D, found.class_D, right_D, found.class_T[~hopeless_T])
    types.append({"name": TYPES[-1], "count": int(hopeless_T.sum()), "cost": missed_cost})
    only_right = cost(found.score_D[right_D], found.class_D[right_D], right_D[right_D], found.class_T)
    only_found = cost(found.score_D, found.class_D, right_D, found.class_T[found.matched_T])
    return {
        "ap50": base,
        "truths": len(found.class_T),
        "detections": len(found.score_D),
        "types": types,
        "false_positives": {"count": int((~right_D).sum()), "cost": only_right},
        "false_negatives": {"count": int((~found.matched_T).sum()), "cost": only_found},
    }


def _judge(truths: Sequence[np.ndarray], detections: Sequence[np.ndarray], most: int) -> _Judged:
    columns: list[tuple[np.ndarray, ...]] = []
    class_T, matched_T = [], []
    first = 0  # index of this image's first ground-truth box among all boxes
    for truths_G5, found_N6 in zip(truths, detections, strict=True):
        best_N6 = found_N6[np.argsort(-found_N6[:, 4], kind="stable")[:most]].astype(np.float64)
        type_N, target_N, matched_G = _judge_image(truths_G5.astype(np.float64), best_N6)
        columns.append((best_N6[:, 4], best_N6[:, 5], type_N, np.where(target_N < 0, -1, target_N + first)))
        class_T.append(truths_G5[:, 0])
        matched_T.append(matched_G)
        first += len(truths_G5)
    score_D, class_D, type_D, target_D = map(np.concatenate, zip(*columns, strict=True))
    return _Judged(score_D, class_D, type_D, target_D, np.concatenate(class_T), np.concatenate(matched_T))


def _judge_image(truths_G5: np.ndarray, found_N6: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the error type and target of each detection in an image, and a mask of the matched ground-truth boxes.

    Detections must be sorted by score. The target is the ground-truth box that a corrected detection would match.
    """
    type_N, target_N = np.full(len(found_N6), BKG), np.full(len(found_N6), -1)
    matched_G = np.zeros(len(truths_G5), bool)
    if not len(truths_G5) or not len(found_N6):
        return type_N, target_N, matched_G
    iou_NG = _iou(found_N6[:, :4], truths_G5[:, 1:])
    same_NG = found_N6[:, 5:] == truths_G5[:, 0]
    own_NG, other_NG = iou_NG * same_NG, iou_NG * ~same_NG
    free_NG = own_NG.copy()
    for n in range(len(found_N6)):
        g = free_NG[n].argmax()
        if free_NG[n, g] >= FOREGROUND:
            type_N[n], matched_G[g] = RIGHT, True
            free_NG[:, g] = 0
    own_N, other_N = own_NG.argmax(axis=1), other_NG.argmax(axis=1)
    for n in np.flatnonzero(type_N != RIGHT).tolist():
        target = -1
        if BACKGROUND <= own_NG[n, own_N[n]] <= FOREGROUND:
            type_N[n], target = LOC, int(own_N[n])
        elif other_NG[n, other_N[n]] >= FOREGROUND:
            type_N[n], target = CLS, int(other_N[n])
        elif (own_NG[n] * matched_G).max() >= FOREGROUND:
            type_N[n] = DUP
        elif iou_NG[n].max() > BACKGROUND:
            type_N[n] = BOTH
        if target >= 0 and not matched_G[target]:
            target_N[n] = target
    return type_N, target_N, matched_G


def _iou(a_N4: np.ndarray, b_G4: np.ndarray) -> np.ndarray:
    low_NG2 = np.maximum(a_N4[:, None, :2], b_G4[None, :, :2])
    high_NG2 = np.minimum(a_N4[:, None, 2:], b_G4[None, :, 2:])
    overlap_NG = np.prod(np.clip(high_NG2 - low_NG2, 0, None), axis=2)
    area_N, area_G = (np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (a_N4, b_G4))
    union_NG = area_N[:, None] + area_G[None] - overlap_NG
    return np.divide(overlap_NG, union_NG, out=np.zeros_like(overlap_NG), where=union_NG > 0)


def _best_of_each_truth(found: _Judged) -> np.ndarray:
    """Return a mask over the errors: for each unmatched ground-truth box, the error with the highest score.

    A box can correct only one error. Localisation and classification errors are ranked together. Of errors with equal scores, the
    first is taken.
    """
    best_D = np.zeros(len(found.score_D), bool)
    with_target = np.flatnonzero(found.target_D >= 0)
    order = with_target[np.argsort(-found.score_D[with_target], kind="stable")]
    _, firsts = np.unique(found.target_D[order], return_index=True)
    best_D[order[firsts]] = True
    return best_D


def _ap(
    score_D: np.ndarray,
    class_D: np.ndarray,
    right_D: np.ndarray,
    class_T: np.ndarray,
    of_T: np.ndarray | None = None,
) -> float:
    """Return COCO's AP at one IoU threshold (101 recalls): the mean over the classes in `of_T`, or in `class_T` if that is None.

    Classes without ground-truth boxes and without detections are left out.
    """
    aps = []
    for cls in np.unique(class_T if of_T is None else of_T):
        mine_D = class_D == cls
        truths = int((class_T == cls).sum())
        if not truths:
            if mine_D.any():
                aps.append(0.0)
            continue
        right = right_D[mine_D][np.argsort(-score_D[mine_D], kind="stable")]
        precision = np.cumsum(right) / np.arange(1, len(right) + 1)
        precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)  # 0 beyond the last recall
        recall = np.cumsum(right) / truths
        aps.append(float(precision[np.searchsorted(recall, RECALLS_R, side="left")].mean()))
    return float(np.mean(aps)) if aps else 0.0
