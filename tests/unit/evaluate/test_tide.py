"""TIDE's six error types on cases made by hand, and the costs by arithmetic.

`benchmarks/tide.py` compares counts and costs with the original, `tidecv`. tidecv also averages over classes without any
truth; here, as in every other mAP of this package, they do not count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.typed import validate
from yolo_compress.errors import DataError
from yolo_compress.evaluate.coco import mean_ap
from yolo_compress.evaluate.tide import TYPES, ModelErrors, errors
from yolo_compress.runtime.max_detections import MAX_DETECTIONS

TRUTH = [0, 0, 0, 100, 100]  # class, xyxy


def case(truths: list[list[float]], detections: list[list[float]]) -> dict[str, Any]:
    return errors([np.array(truths, float).reshape(-1, 5)], [np.array(detections, float).reshape(-1, 6)])


def counts(found: dict[str, Any]) -> dict[str, int]:
    return {entry["name"]: entry["count"] for entry in found["types"] if entry["count"]}


def cost(found: dict[str, Any], name: str) -> float:
    return float(next(entry["cost"] for entry in found["types"] if entry["name"] == name))


RIGHT = [0, 0, 100, 100, 0.9, 0]


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([RIGHT], {}),
        ([[0, 0, 100, 50, 0.9, 0]], {}),  # IoU of exactly 0.5 matches
        ([[0, 0, 100, 49, 0.9, 0]], {"localisation": 1}),
        ([[0, 0, 100, 10, 0.9, 0]], {"localisation": 1}),  # IoU of exactly 0.1 is a poor box
        ([[0, 0, 100, 9, 0.9, 0]], {"background": 1, "missed": 1}),
        ([[0, 0, 100, 100, 0.9, 1]], {"classification": 1}),
        ([[0, 0, 100, 49, 0.9, 1]], {"both": 1, "missed": 1}),
        ([[200, 0, 300, 100, 0.9, 0]], {"background": 1, "missed": 1}),
        ([RIGHT, [0, 0, 100, 90, 0.8, 0]], {"duplicate": 1}),
        ([[0, 0, 100, 90, 0.8, 0], RIGHT], {"duplicate": 1}),
        ([RIGHT, [0, 0, 100, 40, 0.8, 0]], {"localisation": 1}),  # the truth is taken, the box is poor all the same
        ([], {"missed": 1}),
    ],
)
def test_each_type_by_hand(detections: list[list[float]], expected: dict[str, int]) -> None:
    # A second image holds a truth of the other class, found.
    other = np.array([[1, 0, 0, 10, 10]], float), np.array([[0, 0, 10, 10, 0.95, 1]], float)
    found = errors([np.array([TRUTH], float), other[0]], [np.array(detections, float).reshape(-1, 6), other[1]])
    assert counts(found) == expected


def test_without_truths_in_an_image_every_detection_is_background() -> None:
    found = errors([np.zeros((0, 5)), np.array([TRUTH], float)], [np.array([RIGHT], float)] * 2)
    assert counts(found) == {"background": 1} and found["truths"] == 1 and found["detections"] == 2


def test_costs_are_the_rise_of_ap50() -> None:
    """One truth; a background detection before the right one halves the precision at every recall."""
    found = case([TRUTH], [RIGHT, [500, 500, 600, 600, 0.95, 0]])
    assert found["ap50"] == pytest.approx(0.5) and cost(found, "background") == pytest.approx(0.5)
    assert found["false_positives"]["cost"] == pytest.approx(0.5)
    assert sum(cost(found, name) for name in TYPES) == pytest.approx(0.5)
    assert case([TRUTH], [RIGHT])["ap50"] == 1.0


@pytest.mark.parametrize("detection", [[0, 0, 100, 40, 0.9, 0], [0, 0, 100, 100, 0.9, 1]])
def test_mending_a_box_or_a_class_wins_the_truth_back(detection: list[float]) -> None:
    found = case([TRUTH, [1, 200, 0, 210, 10]], [detection, [200, 0, 210, 10, 0.95, 1]])
    name = "localisation" if detection[5] == 0 else "classification"
    # Class 0 goes from 0 to 1. Class 1 was right first and stays at 1 even where the wrong one was of its class.
    assert found["ap50"] == pytest.approx(0.5) and cost(found, name) == pytest.approx(0.5)
    assert cost(found, "missed") == 0.0 and found["false_negatives"]["count"] == 1


def test_one_truth_mends_one_error_and_the_best_score_is_it() -> None:
    """Two poor boxes at one truth: mended, the better one is right and the other goes, so nothing false is left."""
    poor = [[0, 0, 100, 40, 0.6, 0], [0, 0, 100, 30, 0.7, 0]]
    found = case([TRUTH], poor)
    assert counts(found) == {"localisation": 2} and cost(found, "localisation") == pytest.approx(1.0)
    # A class error of a higher score owns the truth: mending the box alone only removes it.
    found = case([TRUTH, [1, 500, 0, 510, 10]], [*poor, [0, 0, 100, 100, 0.8, 1]])
    assert cost(found, "localisation") == 0.0 and cost(found, "classification") > 0


def test_a_missed_truth_no_longer_counts() -> None:
    found = case([TRUTH, [0, 500, 0, 600, 100]], [RIGHT])
    assert counts(found) == {"missed": 1}
    assert cost(found, "missed") == pytest.approx(1 - 51 / 101)  # recalls 0 to 0.5 of 101 had precision 1


def random_set(seed: int, images: int = 40) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Truths with jittered, mislabelled, doubled and invented detections, scores all different."""
    r = np.random.default_rng(seed)
    truths, detections = [], []
    for _ in range(images):
        xy = r.uniform(0, 80, (int(r.integers(1, 7)), 2))
        truth = np.column_stack([r.integers(0, 3, len(xy)), xy, xy + r.uniform(8, 40, xy.shape)])
        near = np.repeat(truth, 2, axis=0)
        boxes = near[:, 1:] + r.normal(0, 3, (len(near), 4))
        label = np.where(r.random(len(near)) < 0.8, near[:, 0], r.integers(0, 3, len(near)))
        truths.append(truth)
        detections.append(np.column_stack([boxes, r.random(len(near)), label]))
    return truths, detections


class Sample:
    """What `coco.mean_ap` takes, from the same boxes."""

    width = height = 200

    def __init__(self, truth_G5: np.ndarray) -> None:
        boxes = np.column_stack(
            [truth_G5[:, 0], (truth_G5[:, 1:3] + truth_G5[:, 3:]) / 400, (truth_G5[:, 3:] - truth_G5[:, 1:3]) / 200]
        )
        self.boxes = tuple((int(cls), *box) for cls, *box in boxes.tolist())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ap50_is_that_of_pycocotools(seed: int) -> None:
    truths, detections = random_set(seed)
    expected = mean_ap([Sample(t) for t in truths], detections, ["a", "b", "c"])["map50"]
    found = errors(truths, detections)
    validate(found, ModelErrors)
    assert found["ap50"] == pytest.approx(expected, abs=1e-12)
    by_name = {entry["name"]: entry["count"] for entry in found["types"]}
    wrong = sum(by_name[name] for name in TYPES if name != "missed")
    assert wrong == found["false_positives"]["count"]
    assert by_name["missed"] <= found["false_negatives"]["count"]


def test_only_the_best_hundred_of_an_image_count() -> None:
    many = np.tile([500.0, 500, 600, 600, 0.5, 0], (MAX_DETECTIONS + 20, 1))
    found = errors([np.array([TRUTH], float)], [np.vstack([many, [*RIGHT[:4], 0.1, 0]])])
    assert found["detections"] == MAX_DETECTIONS and counts(found) == {"background": MAX_DETECTIONS, "missed": 1}


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(DataError, match="no ground truth in 1 images"):
        case([], [RIGHT])
    with pytest.raises(ValueError, match="1 images but 2"):
        errors([np.array([TRUTH], float)], [np.zeros((0, 6))] * 2)
