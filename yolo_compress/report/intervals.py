"""Compute 95 % intervals of mAP and of mAP differences from the baseline, by bootstrap. All models share the resamples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from yolo_compress.evaluate.bootstrap import interval, over_classes, replicate, resamples
from yolo_compress.report.schema import Interval
from yolo_compress.runtime.max_detections import MAX_DETECTIONS
from yolo_compress.runtime.measure.coco_map import match

REPLICATES = 400  # most resamples; with these, another seed moves the ends of an interval by a tenth of its width


def intervals(
    truths: Sequence[np.ndarray],
    models: Mapping[str, Sequence[np.ndarray]],
    reference: str,
    classes: int,
    replicates: int,
    seed: int,
    most: int = MAX_DETECTIONS,
) -> dict[str, Interval]:
    """Return two 95 % intervals for each model: of its mAP50-95, and of the difference from the mAP50-95 of the model `reference`.

    Args:
        truths: Ground-truth boxes of each image: (N, 5) array, columns class, x1, y1, x2, y2 in px.
        models: Name -> detections of each image: (N, 6) array, columns x1, y1, x2, y2 in px, score, class.
        reference: Name of the model that differences are relative to. This model has no difference.
        classes: Number of classes.
        replicates: Number of resamples.
        seed: Seed of the resampling.
        most: Largest number of detections per class and image that count.
    """
    map_R = resampled(truths, models, classes, replicates, seed, most)
    found = {}
    for name, values_R in map_R.items():
        low, high = interval(values_R)
        ends: Interval = {"map50_95_low": low, "map50_95_high": high}
        if name != reference:
            ends["delta_low"], ends["delta_high"] = interval(values_R - map_R[reference])
        found[name] = ends
    return found


def resampled(
    truths: Sequence[np.ndarray],
    models: Mapping[str, Sequence[np.ndarray]],
    classes: int,
    replicates: int,
    seed: int,
    most: int = MAX_DETECTIONS,
) -> dict[str, np.ndarray]:
    """Return model -> map50_95_R, an (R,) array with its mAP50-95 in each of R resamples. For the arguments see `intervals`."""
    weights_RI = resamples(len(truths), replicates, seed)
    map_R = {}
    for name, detections in models.items():  # one model at a time, because its matches need much memory
        (drawn,) = replicate([match(truths, detections, classes, ("all",), most)], weights_RI)
        map_R[name] = over_classes(drawn.ap50_95_RAK[:, 0])
    return map_R
