"""Compare two models on the same images: A, usually the baseline, and B, the new model.

The result is the A/B document (schema 1): differences in accuracy and latency with intervals, and a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from yolo_compress.errors import DataError, RecipeError
from yolo_compress.evaluate.ab.latency_ratio import Rounds, latency_ratio
from yolo_compress.evaluate.ab.operating_point import IOU, operating
from yolo_compress.evaluate.ab.schema import AB, ABVerdict, Difference, Part, Side, Total
from yolo_compress.evaluate.bootstrap import Replicates, interval, over_classes, replicate, resamples
from yolo_compress.runtime.max_detections import MAX_DET, counted
from yolo_compress.runtime.measure.coco_map import AREAS, match, precision

SCHEMA = 1
MIN_IMAGES = 10  # minimum number of images with objects; a bootstrap over fewer says nothing about other images
SIZES = tuple(name for name in AREAS if name != "all")


def compare(
    truths: Sequence[np.ndarray],
    detections_a: Sequence[np.ndarray],
    detections_b: Sequence[np.ndarray],
    names: Sequence[str],
    *,
    margin: float = 0.01,
    conf: float = 0.25,
    max_det: int = MAX_DET,
    replicates: int = 1000,
    seed: int = 0,
    latency_a: Rounds | None = None,
    latency_b: Rounds | None = None,
    about_a: Side | None = None,
    about_b: Side | None = None,
    image_set: str | None = None,
) -> AB:
    """Return the A/B document that compares the detections of models A and B on the same images.

    Args:
        truths: ground-truth boxes, one (N, 5) array per image, columns class, x1, y1, x2, y2 in px.
        detections_a, detections_b: one (N, 6) array per image, columns x1, y1, x2, y2 in px, score, class. All detections with a
            score above 0.001 are needed, not only those above `conf`.
        names: class names in the order of their index.
        margin: fraction of model A's mAP50-95 that model B may lose.
        conf: score threshold in deployment.
        max_det: largest number of detections per image after NMS, equal for both models.
        replicates: number of bootstrap replicates.
        seed: seed of the bootstrap.
        latency_a, latency_b: latencies in ms, one list per round. Each round must measure both models. None: do not compare
            latency.
        about_a, about_b: description of each model. None: the labels are "A" and "B".
        image_set: digest of the images.

    Raises:
        DataError: there is no ground-truth box, or the class of a box has no name.
        RecipeError: a setting is out of range.
        ValueError: the numbers of images differ, or `latency_ratio` rejects the latencies.
    """
    for key, value in (("margin", margin), ("conf", conf)):
        if not 0 <= value <= 1:
            raise RecipeError(f"{key} is {value}, expected a number from 0 to 1")
    if replicates < 1:
        raise RecipeError(f"replicates is {replicates}, expected 1 or more")
    labels = [int(label) for rows in truths for label in rows[:, 0]]
    if not labels:
        raise DataError(f"no ground truth in {len(truths)} images, so there is nothing to compare by")
    if min(labels) < 0 or max(labels) >= len(names):
        raise DataError(f"ground truth of classes {min(labels)} to {max(labels)}, but there are {len(names)} names")
    models = [
        match(truths, detections, len(names), most=counted(max_det)) for detections in (detections_a, detections_b)
    ]
    points = replicate(models, np.ones((1, len(truths)), np.uint16))
    drawn = replicate(models, resamples(len(truths), replicates, seed))
    at_threshold, flips = operating(truths, detections_a, detections_b, models[1], conf, counted(max_det))
    map50_95 = _total(points, drawn, "ap50_95")
    document: AB = {
        "schema": SCHEMA,
        "a": {**about_a} if about_a else {"label": "A"},
        "b": {**about_b} if about_b else {"label": "B"},
        "images": len(truths),
        "image_set": image_set,
        "classes": list(names),
        "settings": {"margin": margin, "conf": conf, "replicates": replicates, "seed": seed, "iou": IOU},
        "verdict": verdict(map50_95, margin, sum(len(rows) > 0 for rows in truths)),
        "map50_95": map50_95,
        "map50": _total(points, drawn, "ap50"),
        "by_class": _by_class(points, drawn, names, np.bincount(labels, minlength=len(names))),
        "by_size": _by_size(points, drawn, models[0].counted_AN),
        "operating": at_threshold,
        "flips": flips,
        "pr": {"a": _curve(precision(models[0])[0]), "b": _curve(precision(models[1])[0])},
        "latency": None,
    }
    if latency_a is not None and latency_b is not None:
        document["latency"] = latency_ratio(latency_a, latency_b, replicates, seed)
    return document


def verdict(map50_95: Difference, margin: float, images: int) -> ABVerdict:
    """Decide whether model B loses at most the allowed part of model A's mAP50-95: "pass", "fail" or "inconclusive".

    The limit is -`margin` x A's mAP. The verdict is "pass" if the whole interval of the difference is above the limit. It is "fail"
    if the whole interval is below.

    Args:
        map50_95: difference over all classes. Its values must not be null.
        margin: fraction of A's mAP50-95 that B may lose.
        images: number of images with objects. If this is less than `MIN_IMAGES`, the verdict is "inconclusive".

    Returns:
        The verdict. `smallest_difference` is half the width of the interval: the smallest true difference that these images can
        show.
    """
    a, b, delta = map50_95["a"], map50_95["b"], map50_95["delta"]
    low, high = map50_95["low"], map50_95["high"]
    assert a is not None and b is not None and delta is not None
    bound = -margin * a
    status: Literal["pass", "fail", "inconclusive"] = "inconclusive"
    enough = images >= MIN_IMAGES
    if not enough:
        pass
    elif low is not None and low > bound:
        status = "pass"
    elif high is not None and high < bound:
        status = "fail"
    what = {
        "pass": f"mAP50-95 of B is at most {100 * margin:g} % below that of A",
        "fail": f"mAP50-95 of B is more than {100 * margin:g} % below that of A",
        "inconclusive": f"these images cannot show whether mAP50-95 of B is more than {100 * margin:g} % below that of A",
    }[status]
    line = f"{status.upper()}: {what}: {a:.3f} -> {b:.3f}, {delta:+.4f}"
    if not enough:
        line += f"; {images} image{'s' * (images != 1)} with objects, an interval needs at least {MIN_IMAGES}"
    if low is None or high is None or not enough:
        return {"status": status, "line": line, "smallest_difference": None}
    smallest = (high - low) / 2
    line += f" (95 % interval {low:+.4f} to {high:+.4f}, limit {bound:+.4f})"
    line += f"; the smallest difference that {images} images can show is {smallest:.4f}"
    return {"status": status, "line": line, "smallest_difference": smallest}


def _total(points: Sequence[Replicates], drawn: Sequence[Replicates], what: str) -> Total:
    """Return the difference of mAP between the models, and each model's interval. mAP is the mean over classes with objects."""

    def over(model: Replicates) -> np.ndarray:
        return over_classes(model.ap50_RK if what == "ap50" else model.ap50_95_RAK[:, 0])

    a, b = (over(model) for model in drawn)
    found = _difference(over(points[0])[0], over(points[1])[0], a, b)
    return {**found, "interval_a": list(interval(a)), "interval_b": list(interval(b))}


def _difference(a: float, b: float, drawn_a_R: np.ndarray, drawn_b_R: np.ndarray) -> Difference:
    """Return the difference B - A and its interval. All values are None if there is no ground-truth box."""
    if not np.isfinite(a):
        return {"a": None, "b": None, "delta": None, "low": None, "high": None}
    low, high = interval(drawn_b_R - drawn_a_R)
    return {"a": float(a), "b": float(b), "delta": float(b - a), "low": low, "high": high}


def _by_class(
    points: Sequence[Replicates], drawn: Sequence[Replicates], names: Sequence[str], truths_K: np.ndarray
) -> list[Part]:
    return [
        {
            "name": name,
            "truths": int(truths_K[k]),
            **_difference(
                points[0].ap50_95_RAK[0, 0, k],
                points[1].ap50_95_RAK[0, 0, k],
                drawn[0].ap50_95_RAK[:, 0, k],
                drawn[1].ap50_95_RAK[:, 0, k],
            ),
        }
        for k, name in enumerate(names)
    ]


def _by_size(points: Sequence[Replicates], drawn: Sequence[Replicates], counted_AN: np.ndarray) -> list[Part]:
    out: list[Part] = []
    for name in SIZES:
        a = list(AREAS).index(name)
        at = [over_classes(model.ap50_95_RAK[:, a]) for model in (*points, *drawn)]
        out.append({"name": name, "truths": int(counted_AN[a].sum()), **_difference(at[0][0], at[1][0], at[2], at[3])})
    return out


def _curve(precision_RK: np.ndarray) -> list[float]:
    there_K = np.isfinite(precision_RK).all(axis=0)
    return [float(value) for value in precision_RK[:, there_K].mean(axis=1)]
