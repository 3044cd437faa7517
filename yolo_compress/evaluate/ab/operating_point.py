"""Compare two models at the score threshold of the deployment: objects found and missed, and images where the models differ.

A detection is shown if its score exceeds the threshold, as in `runtime.detect.post.nms`. A ground-truth box ("truth" in the code) is
found if a shown detection matches the box by COCO's rule at IoU 0.5. Model B's detections are matched with model A's by the same
rule, to measure how boxes and scores moved. Shape suffixes: N ground-truth boxes, D detections, I images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from yolo_compress.evaluate.ab.schema import Flip, McNemar, Operating, Shown
from yolo_compress.runtime.measure.coco_map import IOUS_T, Matches, box_iou, match, sized

IOU = float(IOUS_T[0])
_STEP = 1e4  # thresholds have four decimals


@dataclass(frozen=True)
class _Model:
    """One model's detections above the score threshold in each image, and the ground-truth boxes that the detections match."""

    shown: list[np.ndarray]
    found_N: np.ndarray
    wrong: list[np.ndarray]  # one mask per image: shown detections that match no ground-truth box

    @classmethod
    def at(
        cls, truths: Sequence[np.ndarray], detections: Sequence[np.ndarray], classes: int, conf: float, most: int
    ) -> _Model:
        shown = [rows[rows[:, 4] > conf] for rows in detections]
        matches = match(truths, shown, classes, ("all",), most)
        found_N = np.zeros(len(matches.image_N), bool)
        truth_D = matches.truth_ATD[0, 0]
        found_N[truth_D[truth_D >= 0]] = True
        wrong = [np.zeros(len(rows), bool) for rows in shown]
        for image, row in zip(matches.image_D[truth_D < 0], matches.row_D[truth_D < 0], strict=True):
            wrong[image][row] = True
        return cls(shown, found_N, wrong)

    def figures(self) -> Shown:
        false = sum(int(wrong.sum()) for wrong in self.wrong)
        return {
            "recall": float(self.found_N.mean()),
            "missed": int((~self.found_N).sum()),
            "false_positives": false,
            "false_positives_per_image": false / len(self.shown),
        }


def operating(
    truths: Sequence[np.ndarray],
    detections_a: Sequence[np.ndarray],
    detections_b: Sequence[np.ndarray],
    all_b: Matches,
    conf: float,
    most: int,
) -> tuple[Operating, list[Flip]]:
    """Compare models A and B at one score threshold: the sections `operating` and `flips` of the A/B document.

    Args:
        truths, detections_a, detections_b: ground-truth boxes and detections, as for `coco_map.match`. At least one ground-truth
            box is needed.
        all_b: matches of model B's detections with all scores. The first area range must be "all".
        conf: score threshold of both models.
        most: limit of detections per class and image.

    Returns:
        Two values. The first is the comparison at `conf`. The second is a list of the images where B loses or gains an object, or
        where only B shows a false detection. The images with the most lost objects come first.
    """
    a, b = (_Model.at(truths, rows, all_b.classes, conf, most) for rows in (detections_a, detections_b))
    a_only_N, b_only_N = a.found_N & ~b.found_N, b.found_N & ~a.found_N
    paired, new = _paired(a, b, all_b.classes, most)
    shift_D = paired["score_b"] - paired["score_a"]
    lost_I, gained_I = (np.bincount(all_b.image_N[only_N], minlength=all_b.images) for only_N in (a_only_N, b_only_N))
    section: Operating = {
        "conf": conf,
        "a": a.figures(),
        "b": b.figures(),
        "mcnemar": mcnemar(lost_I, gained_I),
        "threshold_b": restoring_threshold(all_b, int(a.found_N.sum())),
        "score_shift": {"median": _share(shift_D, 50), "p10": _share(shift_D, 10), "p90": _share(shift_D, 90)},
        "agreement": {
            "matched": len(shift_D),
            "median_iou": _share(paired["iou"], 50),
            "p05_iou": _share(paired["iou"], 5),
        },
    }
    flips: list[Flip] = [
        {"image": i, "lost": int(lost_I[i]), "gained": int(gained_I[i]), "new_false_positives": int(new[i])}
        for i in range(all_b.images)
        if lost_I[i] or gained_I[i] or new[i]
    ]
    return section, sorted(flips, key=lambda flip: (-flip["lost"], -flip["new_false_positives"], flip["image"]))


def mcnemar(a_only_I: np.ndarray, b_only_I: np.ndarray) -> McNemar:
    """Test whether models A and B find equally many objects that the other model misses.

    Each image is one observation. Errors in an image are correlated: in a dark image all objects may be missed. So a test over
    boxes would find differences between equal models. This is an exact permutation test, which makes the sign of each image's
    difference random. The p-value is the two-sided share of sign patterns whose sum is at least as far from 0 as the measured sum.
    If every image has at most one object that only one model finds, the result is McNemar's exact test.

    Args:
        a_only_I: number of objects in each image that only A finds.
        b_only_I: number of objects in each image that only B finds.
    """
    difference_I = np.asarray(a_only_I, np.int64) - np.asarray(b_only_I, np.int64)
    sizes = np.abs(difference_I[difference_I != 0])
    chance = np.ones(1)  # probability of each sum from -total to total
    for size in sizes:
        wider = np.zeros(len(chance) + 2 * size)
        wider[: len(chance)] += chance / 2
        wider[2 * size :] += chance / 2
        chance = wider
    sums = np.arange(len(chance)) - len(chance) // 2
    far = np.abs(sums) >= abs(int(difference_I.sum()))
    return {
        "a_only": int(np.sum(a_only_I)),
        "b_only": int(np.sum(b_only_I)),
        "images": len(sizes),
        "p": min(1.0, float(chance[far].sum())),
    }


def restoring_threshold(matches: Matches, wanted: int) -> float | None:
    """Return the highest score threshold, to four decimals, at which a model finds `wanted` objects. None: no threshold does."""
    score_D = np.sort(matches.score_D[matches.truth_ATD[0, 0] >= 0])[::-1]
    if wanted > len(score_D):
        return None
    if wanted == 0:
        return 1.0
    least = score_D[wanted - 1]
    at = max(0.0, (math.ceil(float(least) * _STEP) - 1) / _STEP)
    shown = np.asarray(least, np.float32) > np.float32(
        at
    )  # as `post.nms` compares; four digits may round up to the score
    return at if shown else max(0.0, round(at - 1 / _STEP, 4))


def _paired(a: _Model, b: _Model, classes: int, most: int) -> tuple[dict[str, np.ndarray], list[int]]:
    """Pair the shown detections of model B with the shown detections of model A.

    Returns:
        Scores and IoU of the pairs, and for each image the number of B's false detections that have no partner among A's detections.
    """
    as_truths = [np.column_stack([rows[:, 5], rows[:, :4]]) for rows in a.shown]
    pairs = match(as_truths, b.shown, classes, ("all",), most)
    both_D = pairs.truth_ATD[0, 0] >= 0
    flat_a, flat_b = (np.concatenate([np.zeros((0, 6)), *model.shown]) for model in (a, b))
    first_I = np.cumsum([0, *(len(rows) for rows in b.shown)])
    rows_a = flat_a[pairs.truth_ATD[0, 0][both_D]]
    rows_b = flat_b[(first_I[pairs.image_D] + pairs.row_D)[both_D]]
    alone = [wrong.copy() for wrong in b.wrong]
    for image, row in zip(pairs.image_D[both_D], pairs.row_D[both_D], strict=True):
        alone[image][row] = False
    iou_D = box_iou(sized(rows_a[:, :4]), sized(rows_b[:, :4]))
    return {"score_a": rows_a[:, 4], "score_b": rows_b[:, 4], "iou": iou_D}, [int(rows.sum()) for rows in alone]


def _share(values_D: np.ndarray, percent: float) -> float | None:
    return float(np.percentile(values_D, percent)) if len(values_D) else None
