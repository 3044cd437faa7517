"""Paired bootstrap over images (Efron 1979): the mAP of two models on many resamples of the images. Both models share the resamples.

A replicate draws as many images as there are, with replacement, so image i counts w_i times. Matching is done within an image, so
a replicate is COCO's AP with each detection and ground-truth box of image i counted w_i times. The detections are sorted only once.
A replicate then needs only cumulative sums over the matched detections. If all weights are 1, the result is pycocotools' AP, up to
rounding.

"Truth" in the code is a ground-truth box. Shape suffixes: R replicates, B replicates of a chunk, I images, A area ranges, K classes,
T IoU thresholds, N ground-truth boxes, D detections, E detections that affect the AP at one threshold (see `_threshold`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from yolo_compress.runtime.measure.coco_map import EPSILON, IOUS_T, RECALLS_R, Matches

LEVEL = 0.95  # confidence level of every interval
_CHUNK_ELEMENTS = 200_000  # elements of the widest array, so that it stays in the processor's cache
_CHUNK = (8, 32)  # minimum and maximum number of replicates in a chunk
_LADDER = np.append(RECALLS_R, [np.inf, np.inf])


class Replicates(NamedTuple):
    """AP of a model in each replicate: AP50-95 by area range and class, and AP50 by class. NaN: there is no ground-truth box."""

    ap50_95_RAK: np.ndarray
    ap50_RK: np.ndarray


def resamples(images: int, replicates: int, seed: int) -> np.ndarray:
    """Draw the bootstrap samples. Return weights_RI, uint16: how often each image counts in each replicate."""
    generator = np.random.default_rng(seed)
    return np.stack(
        [np.bincount(generator.integers(0, images, images), minlength=images) for _ in range(replicates)]
    ).astype(np.uint16)


def interval(values_R: np.ndarray) -> tuple[float | None, float | None]:
    """Return the lower and upper end of the 95 % percentile interval; (None, None) if no replicate has a value."""
    finite = values_R[np.isfinite(values_R)]
    if not len(finite):
        return None, None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def over_classes(ap_RK: np.ndarray) -> np.ndarray:
    """Return the mAP of each replicate: the mean AP over the classes with ground-truth boxes in it; NaN if there are none."""
    finite_RK = np.isfinite(ap_RK)
    with np.errstate(invalid="ignore"):
        return np.where(finite_RK, ap_RK, 0).sum(axis=1) / finite_RK.sum(axis=1)


def replicate(models: Sequence[Matches], weights_RI: np.ndarray) -> list[Replicates]:
    """Compute the AP of each model in each replicate, with the same weights for all models.

    Args:
        models: matches of each model's detections with the same ground-truth boxes.
        weights_RI: how often each image counts in each replicate, as `resamples` returns it.
    """
    plans = [_plan(matches) for matches in models]
    widest = max((len(part.image_D) for plan in plans for part in plan), default=1)
    size = int(np.clip(_CHUNK_ELEMENTS // max(widest, 1), *_CHUNK))
    starts = range(0, len(weights_RI), size)
    out = [
        Replicates(
            np.full((len(weights_RI), len(matches.areas), matches.classes), np.nan),
            np.full((len(weights_RI), matches.classes), np.nan),
        )
        for matches in models
    ]

    def work(start: int) -> None:
        here = slice(start, start + size)
        weights_BI = weights_RI[here].astype(np.float64)
        for plan, (ap50_95_RAK, ap50_RK) in zip(plans, out, strict=True):
            for part in plan:
                ap_BT = part.average_precision(weights_BI)
                ap50_95_RAK[here, part.area, part.label] = ap_BT.mean(axis=1)
                if part.whole:
                    ap50_RK[here, part.label] = ap_BT[:, 0]

    with ThreadPoolExecutor(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ) as pool:
        list(pool.map(work, starts))
    return out


@dataclass(frozen=True)
class _Threshold:
    """The detections that affect the AP at one IoU threshold. `_threshold` selects them.

    Attributes:
        image_E: image of each detection.
        place_E: number of detections in `_Part.image_D` up to this detection, including it.
        right_E: whether each detection is right. None: all are right.
        change_E: 1 if the detection counts only at this threshold, -1 if it counts only at the highest one, else 0. None: all are
            0.
    """

    image_E: np.ndarray
    place_E: np.ndarray
    right_E: np.ndarray | None
    change_E: np.ndarray | None


@dataclass(frozen=True)
class _Part:
    """Ground-truth boxes and detections of one class in one area range, prepared for the AP of many replicates."""

    area: int
    label: int
    whole: bool  # whether the area range is "all"
    truth_images_N: np.ndarray  # image of each ground-truth box
    image_D: np.ndarray  # image of each detection that counts at the highest threshold, best first
    thresholds: tuple[_Threshold, ...]

    def average_precision(self, weights_BI: np.ndarray) -> np.ndarray:
        """Return ap_BT, the AP of each replicate at each IoU threshold; NaN where no ground-truth box counts."""
        truths_B1 = weights_BI[:, self.truth_images_N].sum(axis=1, keepdims=True)
        counted_BD = np.zeros((len(weights_BI), len(self.image_D) + 1))
        np.cumsum(weights_BI[:, self.image_D], axis=1, out=counted_BD[:, 1:])
        ap_BT = np.zeros((len(weights_BI), len(self.thresholds)))
        for t, at in enumerate(self.thresholds):
            if len(at.image_E):
                ap_BT[:, t] = _average(weights_BI, at, counted_BD, truths_B1)
        return np.where(truths_B1 > 0, ap_BT, np.nan)


def _average(weights_BI: np.ndarray, at: _Threshold, counted_BD: np.ndarray, truths_B1: np.ndarray) -> np.ndarray:
    """Return the AP of each replicate at one threshold.

    The AP is the mean over 101 recalls. At each recall, the best precision at this or a higher recall is used; 0 if the recall is not
    reached.
    """
    weights_BE = weights_BI[:, at.image_E]
    right_BE = np.cumsum(weights_BE if at.right_E is None else weights_BE * at.right_E, axis=1)
    counted_BE = counted_BD[:, at.place_E]
    if at.change_E is not None:
        counted_BE += np.cumsum(weights_BE * at.change_E, axis=1)
    counted_BE += EPSILON
    precision_BE = np.divide(right_BE, counted_BE, out=counted_BE)
    best_BE = np.maximum.accumulate(precision_BE[:, ::-1], axis=1)[:, ::-1]
    passed_BE = _passed(right_BE / np.maximum(truths_B1, 1))
    passed_BE[:, 1:] -= passed_BE[:, :-1].copy()  # recalls that this detection is the first to reach
    return np.einsum("be,be->b", best_BE, passed_BE) / len(RECALLS_R)


def _passed(recall: np.ndarray) -> np.ndarray:
    """Return the number of COCO's recall points up to each recall, as floats: a faster `searchsorted(RECALLS_R, recall, "right")`."""
    guess = (recall * (len(RECALLS_R) - 1)).astype(np.intp)  # may be off by one: 0.29 * 100 is below 29 in floats
    return guess + (_LADDER[guess] <= recall) + (_LADDER[guess + 1] <= recall).astype(np.float64)


def _plan(matches: Matches) -> list[_Part]:
    return [part for a in range(len(matches.areas)) for part in _parts(matches, a)]


def _parts(matches: Matches, a: int) -> Iterator[_Part]:
    for k in range(matches.classes):
        truths = matches.counted_AN[a] & (matches.class_N == k)
        if not truths.any():
            continue
        here = matches.of_class(k)
        image_D, counts_TD = matches.image_D[here], matches.counts_ATD[a, :, here]
        right_TD = counts_TD & (matches.truth_ATD[a, :, here] >= 0)
        base_D = counts_TD[-1]
        places_D = np.cumsum(base_D)
        thresholds = tuple(
            _threshold(image_D, right_TD[t], counts_TD[t].astype(np.int8) - base_D, places_D)
            for t in range(len(IOUS_T))
        )
        yield _Part(a, k, matches.areas[a] == "all", matches.image_N[truths], image_D[base_D], thresholds)


def _threshold(image_D: np.ndarray, right_D: np.ndarray, change_D: np.ndarray, places_D: np.ndarray) -> _Threshold:
    """Select the detections that affect the AP at one IoU threshold.

    These are the right detections, because the precision has a maximum only at a right detection. Detections that count either at
    this threshold or at the highest threshold, but not at both, are also selected, for `change_E`.
    """
    matter = np.flatnonzero(right_D | (change_D != 0))
    right_E, change_E = right_D[matter], change_D[matter]
    return _Threshold(
        image_D[matter],
        places_D[matter],
        None if right_E.all() else right_E.astype(np.float64),
        change_E.astype(np.float64) if change_E.any() else None,
    )
