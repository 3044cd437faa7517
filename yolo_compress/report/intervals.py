"""95 % intervals of every mAP of the report and of its difference from the baseline's, all by the same resampled images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from yolo_compress.evaluate.bootstrap import interval, over_classes, replicate, resamples
from yolo_compress.report.schema import Interval
from yolo_compress.runtime.limits import MAX_DETECTIONS
from yolo_compress.runtime.measure.coco_map import match

REPLICATES = 400  # at most: the ends of an interval move by a tenth of its width from seed to seed


def intervals(
    truths: Sequence[np.ndarray],
    models: Mapping[str, Sequence[np.ndarray]],
    reference: str,
    classes: int,
    replicates: int,
    seed: int,
    most: int = MAX_DETECTIONS,
) -> dict[str, Interval]:
    """`map50_95_low`, `map50_95_high`, `delta_low`, `delta_high` of each model; the reference has no delta.

    Args:
        truths: one N5 array an image: class, xyxy.
        models: name -> one N6 array an image: xyxy, score, class.
        reference: the name that differences are from.
        classes: how many.
        replicates, seed: of the resampling.
        most: detections of a class in an image that count.
    """
    weights_RI = resamples(len(truths), replicates, seed)
    map_R = {}
    for name, detections in models.items():  # one at a time: a model's matches are large
        (drawn,) = replicate([match(truths, detections, classes, ("all",), most)], weights_RI)
        map_R[name] = over_classes(drawn.ap50_95_RAK[:, 0])
    found = {}
    for name, values_R in map_R.items():
        low, high = interval(values_R)
        ends: Interval = {"map50_95_low": low, "map50_95_high": high}
        if name != reference:
            ends["delta_low"], ends["delta_high"] = interval(values_R - map_R[reference])
        found[name] = ends
    return found
