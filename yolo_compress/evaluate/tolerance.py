"""Tolerances for the detections of an engine on another processor or runtime, from the differences between engines here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from yolo_compress.runtime.measure.golden import SAME, Difference, Tolerance, difference

IOU = 0.7  # threshold of NMS
CONF = 0.25
LEAST_SCORE = 0.001
FLOOR = 0.4  # times `conf`: lowest score of a partner
BOX_PX, SCORE = 0.5, 1e-3  # tolerance for the same runtime and arithmetic
MARGIN = 2.0  # tolerance for another runtime, as a multiple of the differences here
LEAST_SHARE = (
    0.02  # of boxes without partner, in FP16 and INT8: near IoU 0.7, rounding decides which of two boxes NMS keeps
)
Detections = list[np.ndarray]


def confidence(found: Detections, count: int) -> float:
    """Return the score threshold of the golden self-test.

    The threshold is 0.25. For a model with lower scores, the threshold is the `count`-th highest score, or the lowest score if
    there are fewer boxes.
    """
    scores = np.sort(np.concatenate([rows[:, 4] for rows in found]))[::-1]
    return min(CONF, float(scores[min(count, len(scores)) - 1])) if len(scores) else CONF


def tolerate(
    found: Mapping[str, Detections], conf: float, boxes: int
) -> tuple[dict[str, Tolerance], dict[str, dict[str, float]]]:
    """Return the tolerances of the golden self-test by precision, and the measured differences by pair of engines.

    Args:
        found: `<runtime>-<precision>` -> detections with a score of at least `FLOOR` x `conf`: for each image an (N, 6) array,
            columns x1, y1, x2, y2 in px, score, class.
        conf: Score threshold of the self-test.
        boxes: Number of boxes above `conf` in the golden images. The tolerance `unmatched` is a fraction of this number.
    """
    precisions = {key: key.rpartition("-")[2] for key in found}
    tolerances: dict[str, Tolerance] = {SAME: {"of": "worst", "box_px": BOX_PX, "score": SCORE, "unmatched": 0}}
    differences = dict[str, dict[str, float]]()
    for precision in sorted(set(precisions.values())):
        own = [key for key in found if precisions[key] == precision]
        peers = [key for key in found if precisions[key] in (precision, "fp32")]
        both = sorted({tuple(sorted(pair)) for pair in product(own, peers) if pair[0] != pair[1]})
        pairs = {f"{a} {b}": difference(found[a], found[b], conf) for a, b in both}
        of = "worst" if precision == "fp32" else "most"
        share = max((_share(one) for one in pairs.values()), default=0.0)
        share = max(share, 0.0 if precision == "fp32" else LEAST_SHARE)
        tolerances[precision] = {
            "of": of,
            "box_px": _above([getattr(one, f"{of}_box_px") for one in pairs.values()], BOX_PX),
            "score": _above([getattr(one, f"{of}_score") for one in pairs.values()], SCORE),
            # less than half of the boxes, so that an engine that detects nothing fails
            "unmatched": min(math.ceil(MARGIN * share * boxes), max((boxes - 1) // 2, 0)),
        }
        differences.update({pair: {k: round(v, 5) for k, v in one._asdict().items()} for pair, one in pairs.items()})
    return tolerances, differences


def _share(one: Difference) -> float:
    """Return the fraction of boxes without a partner, which only one of the two engines detected."""
    return one.unmatched / max(one.unmatched + one.compared, 1)


def _above(measured: Sequence[float], least: float) -> float:
    return round(max([least, *(MARGIN * one for one in measured)]), 5)
