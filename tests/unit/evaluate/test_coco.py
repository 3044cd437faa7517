"""mAP: known answers, pycocotools' own figures, and how near Ultralytics' integration of the same detections is."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from tests.support.matching_scenes import Scene, drawn
from tests.support.matching_scenes import by_pycocotools as by_coco_api
from yolo_compress.errors import DataError
from yolo_compress.evaluate.coco import _precision, absolute_boxes, mean_ap
from yolo_compress.evaluate.ultralytics_ap import ultralytics_ap
from yolo_compress.runtime.measure.coco_map import match

NAMES = ("bolt", "nut", "screw")


@dataclass(frozen=True)
class Image:
    width: int
    height: int
    boxes: tuple[tuple[int, float, float, float, float], ...]


def perfect(truth: Image) -> np.ndarray:
    """The truth as detections."""
    boxes = absolute_boxes(truth)
    return np.column_stack([boxes[:, 1:], np.linspace(0.9, 0.5, len(boxes)), boxes[:, 0]])


def scene(seed: int, classes: int = 3, images: int = 12) -> tuple[list[Image], list[np.ndarray]]:
    """Truths, and detections that are shifted, mislabelled, doubled or invented."""
    generator = np.random.default_rng(seed)
    truths, found = [], []
    for _ in range(images):
        count = int(generator.integers(0, 8))
        sizes = generator.uniform(0.05, 0.4, (count, 2))
        centres = generator.uniform(0.3, 0.7, (count, 2))
        boxes = tuple(
            (int(generator.integers(0, classes)), float(x), float(y), float(w), float(h))
            for (x, y), (w, h) in zip(centres, sizes, strict=True)
        )
        truth = Image(int(generator.integers(80, 400)), int(generator.integers(80, 400)), boxes)
        rows = np.repeat(perfect(truth), 3, axis=0)
        rows = rows[generator.random(len(rows)) < 0.6]
        rows[:, :4] += generator.normal(0, 4, (len(rows), 4))
        invented = generator.uniform(0, 80, (5, 4))
        invented[:, 2:] += invented[:, :2] + 1
        rows = np.concatenate([rows, np.column_stack([invented, np.zeros((5, 2))])])
        rows[:, 4] = generator.random(len(rows))
        rows[:, 5] = np.where(generator.random(len(rows)) < 0.8, rows[:, 5], generator.integers(0, classes, len(rows)))
        truths.append(truth)
        found.append(rows[np.argsort(-rows[:, 4])].astype(np.float32))
    return truths, found


def by_pycocotools(truths: list[Image], found: list[np.ndarray], folder: Path) -> tuple[float, float]:
    """Through files, `loadRes` and `summarize`, as its documentation has it; ids count from 1."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, (truth, rows) in enumerate(zip(truths, found, strict=True), 1):
        for label, x, y, w, h in truth.boxes:
            box = [(x - w / 2) * truth.width, (y - h / 2) * truth.height, w * truth.width, h * truth.height]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": label + 1, "bbox": box,
                 "area": box[2] * box[3], "iscrowd": 0}
            )  # fmt: skip
        for x1, y1, x2, y2, score, label in rows.tolist():
            results.append(
                {"image_id": number, "category_id": int(label) + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
            )
    images = [{"id": n, "width": t.width, "height": t.height} for n, t in enumerate(truths, 1)]
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(NAMES)]
    document = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
    (folder / "truth.json").write_text(json.dumps(document))
    (folder / "found.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth_side = COCO(str(folder / "truth.json"))
        evaluation = COCOeval(truth_side, truth_side.loadRes(str(folder / "found.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pycocotools_by_its_own_files(seed: int, tmp_path: Path) -> None:
    truths, found = scene(seed)
    ours = mean_ap(truths, found, NAMES)
    expected = by_pycocotools(truths, found, tmp_path)
    assert 0.05 < expected[0] < 0.95, "a scene that says something"
    assert (ours["map50_95"], ours["map50"]) == pytest.approx(expected, abs=1e-12)


def test_more_than_a_hundred_detections_count_as_in_pycocotools(tmp_path: Path) -> None:
    truths, found = scene(9, images=4)
    noise = np.random.default_rng(0).uniform(0, 60, (150, 6))
    noise[:, 2:4] += noise[:, :2]
    noise[:, 4], noise[:, 5] = 0.999, 0
    crowded = [np.concatenate([noise, rows]) for rows in found]
    assert mean_ap(truths, crowded, NAMES)["map50_95"] == pytest.approx(
        by_pycocotools(truths, crowded, tmp_path)[0], abs=1e-12
    )


ONE = Image(100, 100, ((0, 0.25, 0.25, 0.2, 0.2), (0, 0.75, 0.75, 0.2, 0.2)))


def test_known_answer() -> None:
    """Right, wrong, right: precision 1 up to recall 0.5 (51 of 101 points), then 2/3."""
    found = np.array([[15, 15, 35, 35, 0.9, 0], [40, 40, 60, 60, 0.8, 0], [65, 65, 85, 85, 0.7, 0]])
    expected = (51 + 50 * 2 / 3) / 101
    result = mean_ap([ONE], [found], NAMES)
    assert result["map50"] == pytest.approx(expected) and result["map50_95"] == pytest.approx(expected)


def test_a_looser_box_counts_up_to_its_overlap() -> None:
    """IoU 0.8: right at the thresholds 0.5 to 0.8, seven of ten."""
    truth = Image(100, 100, ((0, 0.5, 0.5, 0.4, 0.4),))
    result = mean_ap([truth], [np.array([[30, 30, 70, 62.0001, 0.9, 0]])], NAMES)
    assert result["map50_95"] == pytest.approx(0.7) and result["map50"] == pytest.approx(1.0)


@pytest.mark.fault(66)
@pytest.mark.parametrize("evaluate", [mean_ap, ultralytics_ap])
def test_perfect_and_absent_detections(evaluate: Any) -> None:
    truths, _ = scene(1)
    result = evaluate(truths, [perfect(truth) for truth in truths], NAMES)
    assert result["map50_95"] == pytest.approx(1.0, abs=0.006 if evaluate is ultralytics_ap else 1e-12)
    nothing = evaluate(truths, [np.zeros((0, 6), np.float32) for _ in truths], NAMES)
    assert nothing["map50_95"] == nothing["map50"] == 0.0
    assert set(nothing["per_class"].values()) == {0.0}


@pytest.mark.fault(15)
def test_a_class_without_ground_truth_is_none_and_does_not_count() -> None:
    wrong = np.array([[0, 0, 9, 9, 0.95, 2]])
    found = np.concatenate([wrong, perfect(ONE)])
    result = mean_ap([ONE], [found], NAMES)
    assert result["per_class"] == {"bolt": pytest.approx(1.0), "nut": None, "screw": None}
    assert result["per_class_50"] == result["per_class"]
    assert result["map50_95"] == pytest.approx(1.0) and result["counts"] == {"bolt": 2, "nut": 0, "screw": 0}
    assert ultralytics_ap([ONE], [found], NAMES)["per_class"] == {
        "bolt": pytest.approx(0.995, abs=0.006),
        "nut": None,
        "screw": None,
    }


def test_rows_are_corners_then_score_then_class() -> None:
    truth = Image(200, 100, ((1, 0.25, 0.5, 0.1, 0.4),))
    assert absolute_boxes(truth) == pytest.approx(np.array([[1, 40, 30, 60, 70]]))
    assert mean_ap([truth], [np.array([[40, 30, 60, 70, 0.5, 1]])], NAMES)["map50_95"] == pytest.approx(1.0)
    for other in ([40, 30, 60, 70, 1, 0.5], [40, 30, 20, 40, 0.5, 1], [30, 40, 70, 60, 0.5, 1]):
        assert mean_ap([truth], [np.array([other])], NAMES)["map50_95"] == 0


def test_the_order_of_rows_does_not_matter_but_that_of_images_does() -> None:
    truths, found = scene(2)
    shuffled = [rows[::-1] for rows in found]
    assert mean_ap(truths, shuffled, NAMES)["map50_95"] == pytest.approx(mean_ap(truths, found, NAMES)["map50_95"])
    assert mean_ap(truths, found[1:] + found[:1], NAMES)["map50_95"] < 0.1


@pytest.mark.fault(64)
@pytest.mark.parametrize("evaluate", [mean_ap, ultralytics_ap])
def test_what_cannot_be_evaluated(evaluate: Any) -> None:
    with pytest.raises(ValueError, match="1 images but 2 sets"):
        evaluate([ONE], [np.zeros((0, 6))] * 2, NAMES)
    with pytest.raises(DataError, match="no ground truth in 1 images"):
        evaluate([Image(9, 9, ())], [np.zeros((0, 6))], NAMES)


def test_names_must_be_distinct_and_enough() -> None:
    with pytest.raises(DataError, match="repeat.*bolt"):
        mean_ap([ONE], [perfect(ONE)], ("bolt", "bolt"))
    with pytest.raises(DataError, match="2 names"):
        mean_ap([Image(9, 9, ((2, 0.5, 0.5, 0.1, 0.1),))], [np.zeros((0, 6))], ("bolt", "nut"))


@pytest.mark.parametrize("seed", range(3))
def test_ultralytics_integration_is_near_pycocotools(seed: int) -> None:
    """Same matching rule; the curve is sampled at the same 101 recalls but interpolated instead of stepped."""
    truths, found = scene(seed, images=60)
    ours, theirs = mean_ap(truths, found, NAMES), ultralytics_ap(truths, found, NAMES)
    assert theirs["map50_95"] == pytest.approx(ours["map50_95"], abs=0.02)
    assert theirs["map50"] == pytest.approx(ours["map50"], abs=0.02)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn())
def test_precision_is_that_of_pycocotools_to_the_last_bit(case: Scene) -> None:
    truths, found = case
    ours = _precision(match(truths, found, len(NAMES), ("all",)))
    expected = by_coco_api(truths, found, len(NAMES))[..., 0]
    assert np.array_equal(np.where(ours > -1, ours, np.nan), expected, equal_nan=True)
