"""The numpy matcher against pycocotools: the same precision at every threshold, recall, class and area range."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from tests.support.matching_scenes import NAMES, SIDE, Scene, by_pycocotools, drawn, scene
from yolo_compress.evaluate import coco
from yolo_compress.runtime.max_detections import counted
from yolo_compress.runtime.measure.coco_map import AREAS, counting, match, mean_ap, precision


def assert_equal(truths: list[np.ndarray], found: list[np.ndarray]) -> np.ndarray:
    """Returns pycocotools' precision_TRK."""
    expected = by_pycocotools(truths, found, len(NAMES))
    matches = match(truths, found, len(NAMES))
    for index, area in enumerate(AREAS):
        np.testing.assert_allclose(precision(matches, area), expected[..., index], rtol=0, atol=1e-12)
    return expected[..., 0]


@pytest.mark.parametrize("seed", range(6))
def test_equal_to_pycocotools(seed: int) -> None:
    truths, found = scene(seed)
    assert_equal(truths, found)
    assert 0.05 < np.nanmean(precision(match(truths, found, 3))) < 0.95, "a scene that says something"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(drawn())
def test_equal_to_pycocotools_on_what_hypothesis_draws(case: Scene) -> None:
    precision_TRK = assert_equal(*case)
    if sum(map(len, case[0])):
        assert mean_ap(*case, NAMES)["map50_95"] == pytest.approx(np.nanmean(precision_TRK), abs=1e-12)
    else:
        with pytest.raises(ValueError, match="no ground truth"):
            mean_ap(*case, NAMES)


def test_only_the_best_hundred_of_a_class_in_an_image_count() -> None:
    truths, found = scene(3, images=4)
    noise = np.random.default_rng(0).uniform(0, 60, (150, 6)).astype(np.float32)
    noise[:, 2:4] += noise[:, :2]
    noise[:, 4], noise[:, 5] = 0.75, np.repeat([0, 1], [120, 30])
    assert_equal(truths, [np.concatenate([noise, rows]) for rows in found])
    assert_equal(truths, [np.concatenate([rows, noise]) for rows in found])


@pytest.mark.parametrize("seed", range(3))
def test_mean_ap_is_that_of_evaluate(seed: int) -> None:
    """Through the same relative labels as a data set's."""
    truths, found = scene(seed)

    class Image:
        width = height = 300

        def __init__(self, rows: np.ndarray) -> None:
            x1, y1, x2, y2 = rows[:, 1:].T / SIDE
            relative = np.column_stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]).tolist()
            self.boxes = tuple((int(k), *box) for k, box in zip(rows[:, 0], relative, strict=True))

    samples: Any = [Image(rows) for rows in truths]
    expected = coco.mean_ap(samples, found, NAMES)
    ours = mean_ap([coco.absolute_boxes(sample) for sample in samples], found, NAMES)
    assert ours["counts"] == expected["counts"]
    for key in ("map50_95", "map50", "per_class", "per_class_50"):
        assert ours[key] == pytest.approx(expected[key], abs=1e-12)


def test_a_class_without_truth_is_none_and_nothing_found_is_zero() -> None:
    truth, nothing = np.array([[1, 0, 0, 10, 10]]), np.zeros((0, 6), np.float32)
    result = mean_ap([truth], [nothing], NAMES)
    assert result["per_class"] == {"bolt": None, "nut": 0.0, "screw": None}
    assert result["map50_95"] == result["map50"] == 0.0
    stray = np.array([[0, 0, 9, 9, 0.9, 0], [0, 0, 10, 10, 0.5, 1]])
    assert mean_ap([truth], [stray], NAMES)["map50_95"] == pytest.approx(1.0)


def test_who_found_what() -> None:
    """The better score takes the better box; its double is left with nothing; rows keep their numbers."""
    truths = [np.zeros((0, 5)), np.array([[0, 0, 0, 10, 10], [0, 20, 20, 30, 30]])]
    found = [
        np.array([[0, 0, 5, 5, 0.4, 0]]),
        np.array([[20, 20, 30, 30, 0.3, 0], [0, 0, 10, 9, 0.9, 0], [0, 0, 10, 10, 0.8, 0]]),
    ]
    matches = match(truths, found, 1, ("all", "large"))
    assert matches.image_D.tolist() == [1, 1, 0, 1] and matches.row_D.tolist() == [1, 2, 0, 0]
    assert matches.truth_ATD[0, 0].tolist() == [0, -1, -1, 1]
    assert matches.truth_ATD[0, -1].tolist() == [-1, 0, -1, 1], "IoU 0.9 is not 0.95"
    assert not matches.counted_AN[1].any() and not matches.counts_ATD[1].any(), "nothing large"


def test_what_cannot_be_matched() -> None:
    one, nothing = np.array([[2, 0, 0, 9, 9]]), np.zeros((0, 6))
    with pytest.raises(ValueError, match="1 images but 2 sets"):
        match([one], [nothing] * 2, 3)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        match([one], [nothing], 2)
    with pytest.raises(ValueError, match="no ground truth in 1 images"):
        mean_ap([np.zeros((0, 5))], [nothing], NAMES)
    with pytest.raises(ValueError, match="repeat.*bolt"):
        mean_ap([one], [nothing], ("bolt", "bolt", "nut"))


@pytest.mark.fault(81)
def test_256_perfect_detections_are_1_where_as_many_are_kept() -> None:
    """COCO counts 100 of a class in an image: 0.396 of a perfect model. Where NMS keeps more than 300, all count."""
    side = np.arange(16) * 20.0
    boxes_N4 = np.array([[x, y, x + 10, y + 10] for x in side for y in side])
    truths = [np.insert(boxes_N4, 0, 0, axis=1)]
    found = [np.column_stack([boxes_N4, np.linspace(0.9, 0.5, 256), np.zeros(256)])]
    assert (counted(1), counted(300), counted(301)) == (100, 100, 301)
    for evaluate in (mean_ap, by_truth):
        assert evaluate(truths, found, ["nut"])["map50_95"] == pytest.approx(0.396, abs=1e-3)
        assert evaluate(truths, found, ["nut"], counted(301))["map50_95"] == pytest.approx(1.0)
    assert counting(found[0]).sum() == 100 and counting(found[0], 301).all()


def by_truth(truths: list[np.ndarray], found: list[np.ndarray], names: list[str], *most: int) -> dict[str, Any]:
    """As `mean_ap`, by pycocotools."""
    rows = truths[0][:, 1:] / 400
    boxes = [(0, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1) for x1, y1, x2, y2 in rows.tolist()]
    return coco.mean_ap([SimpleNamespace(width=400, height=400, boxes=boxes)], found, names, *most)
