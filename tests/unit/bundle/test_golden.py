"""The golden self-test: when detections count as equal, and tolerances from measured differences."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.typed import validate
from yolo_compress.bundle import golden as making
from yolo_compress.errors import DataError
from yolo_compress.evaluate import golden_images
from yolo_compress.evaluate.tolerance import BOX_PX, SCORE, confidence, tolerate
from yolo_compress.runtime.backends.base import EngineInfo
from yolo_compress.runtime.errors import EngineError
from yolo_compress.runtime.measure import golden
from yolo_compress.runtime.measure.golden import Difference, difference

A = np.array(
    [[0, 0, 20, 20, 0.9, 0], [50, 50, 90, 80, 0.6, 1], [52, 50, 90, 80, 0.2, 1], [5, 5, 9, 9, 0.3, 2]], np.float32
)


def moved(row: int, column: int, by: float) -> np.ndarray:
    other = A.copy()
    other[row, column] += by
    return other


def test_equal_sets_do_not_differ() -> None:
    assert difference([A, A[:0]], [A[::-1], A[:0]], 0.25) == Difference(0, 0, 0, 0, 0, 3)
    assert difference([], [], 0.25) == Difference(0, 0, 0, 0, 0, 0)


def test_the_largest_side_and_score_count() -> None:
    found = difference([A], [moved(1, 2, 3)], 0.25)
    assert found[:2] == pytest.approx((3, 0), abs=1e-6) and found.most_box_px == pytest.approx(
        np.percentile([0, 3, 0], 90)
    )
    assert difference([A], [moved(0, 4, -0.1)], 0.25).worst_score == pytest.approx(0.1)
    assert difference([A], [moved(2, 2, 4)], 0.25).worst_box_px == 0, "below conf on both sides"


def test_a_score_near_the_threshold_is_not_a_missing_box() -> None:
    found = difference([A], [moved(3, 4, -0.1)], 0.25)
    assert (found.unmatched, found.compared) == (0, 3) and found.worst_score == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("one", "two", "unmatched"),
    [(A, A[1:], 1), (A[1:], A, 1), (A, A[:0], 3), (A, moved(0, 5, 1), 2), (A, moved(0, 0, 15), 2)],
)
def test_boxes_without_partner_are_counted_on_both_sides(one: np.ndarray, two: np.ndarray, unmatched: int) -> None:
    assert difference([one], [two], 0.25).unmatched == unmatched


def test_each_box_has_one_partner() -> None:
    twice = np.concatenate([A, A[:1]])
    assert difference([A], [twice], 0.25).unmatched == 1


def test_tolerances_are_twice_the_measured_differences_and_at_least_the_minimum() -> None:
    found = {"x-fp32": [A], "y-fp32": [moved(0, 0, 1)], "x-int8": [moved(0, 4, -0.2)], "y-int8": [moved(0, 4, -0.2)]}
    tolerances, measured = tolerate(found, 0.25, 100)
    assert tolerances["same"] == {"of": "worst", "box_px": BOX_PX, "score": SCORE, "unmatched": 0}
    assert tolerances["fp32"] == {"of": "worst", "box_px": 2.0, "score": SCORE, "unmatched": 0}
    most = np.percentile([0.2, 0, 0], 90)
    assert tolerances["int8"]["score"] == pytest.approx(2 * most, abs=1e-4) and tolerances["int8"]["of"] == "most"
    assert tolerances["int8"]["unmatched"] == 4, "2 % at least, twice"
    assert set(measured) == {
        "x-fp32 y-fp32",
        "x-fp32 x-int8",
        "x-int8 y-fp32",
        "x-fp32 y-int8",
        "y-fp32 y-int8",
        "x-int8 y-int8",
    }
    assert tolerate({"x-fp32": [A]}, 0.25, 9)[0]["fp32"] == {
        "of": "worst",
        "box_px": BOX_PX,
        "score": SCORE,
        "unmatched": 0,
    }


def test_a_model_with_low_scores_is_tested_at_a_lower_threshold() -> None:
    assert confidence([A, A], 4) == 0.25
    low = A * np.array([1, 1, 1, 1, 0.1, 1], np.float32)
    assert confidence([low, low], 2) == pytest.approx(0.09)
    assert confidence([low[:0]], 2) == 0.25
    assert confidence([low[2:3]], 2) == pytest.approx(0.02), "all there are, where there are fewer"


def scored(*scores: float) -> np.ndarray:
    return np.array([[10 + 60 * i, 10, 50 + 60 * i, 50, s, 0] for i, s in enumerate(scores)], float).reshape(-1, 6)


def test_images_with_boxes_are_chosen_first() -> None:
    found = [scored(0.05)] * 32
    for i in (1, 2, 3):
        found[i] = scored(0.9, 0.8)
    assert golden_images._chosen(found, 0.25, 4) == [0, 1, 2, 3]
    assert golden_images._chosen(found, 0.25, 2) == [1, 2]


@pytest.mark.parametrize(
    "found",
    [
        {"a-int8": [scored(0.9)], "b-int8": [scored(0.9)]},
        {"a-fp32": [scored(0.9, 0.9, 0.9, 0.9)], "a-int8": [scored(0.9, 0.9)]},
    ],
)
def test_an_engine_that_detects_nothing_fails_for_any_tolerance(found: dict[str, Any]) -> None:
    expected = next(iter(found.values()))
    tolerances, _ = tolerate(found, 0.25, len(expected[0]))
    dead = difference(expected, [scored()], 0.25)
    assert all(golden.beyond(dead, tolerance) for tolerance in tolerances.values())


def test_a_model_that_detects_nothing_makes_no_self_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "0.npy", np.zeros((8, 8, 3), np.uint8))
    dataset: Any = SimpleNamespace(val=[SimpleNamespace(image=tmp_path / "0.npy", name="0")])
    monkeypatch.setattr(golden_images, "read_image", np.load)
    monkeypatch.setattr(making, "_detected", lambda export, engines, images: ({"onnxruntime-fp32": [scored()]}, {}))
    nothing: Any = None
    with pytest.raises(DataError, match="detects nothing above"):
        making.write(tmp_path / "golden", dataset, nothing, nothing, 1)


class Fixed:
    """A stand-in for an engine: its output has the boxes of A."""

    needs_nms = True
    names, precision, imgsz, batch, channels, executed = ("a", "b", "c"), "fp32", (96, 96), 1, 3, "fp32"

    def __init__(self, rows: np.ndarray = A) -> None:
        self.output = np.zeros((1, 7, len(rows)), np.float32)
        self.output[0, :4] = np.stack(
            [
                rows[:, 0] + rows[:, 2],
                rows[:, 1] + rows[:, 3],
                2 * (rows[:, 2] - rows[:, 0]),
                2 * (rows[:, 3] - rows[:, 1]),
            ]
        ) / np.float32(2)
        for i, row in enumerate(rows):
            self.output[0, 4 + int(row[5]), i] = row[4]

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        return self.output


def info(runtime: str, library: str, onnx_sha256: str = "ab") -> EngineInfo:
    return EngineInfo(runtime, "fp32", (96, 96), ("a", "b"), onnx_sha256, library)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / golden.FOLDER).mkdir()
    np.save(tmp_path / golden.FOLDER / "0.npy", np.zeros((96, 96, 3), np.uint8))
    same = {"of": "worst", "box_px": 0.5, "score": 1e-3, "unmatched": 0}
    document: dict[str, Any] = {
        "schema": 1, "conf": 0.25, "floor": 0.1, "iou": 0.7, "images": [{"file": "0.npy", "name": "a"}],
        "engines": {key: {"executed": "fp32", "library": "1", "onnx_sha256": "ab"} for key in ("onnxruntime-fp32", "openvino-fp32")},
        "tolerances": {"same": same, "fp32": {**same, "box_px": 2.0}},
        "expected": {key: [A.tolist()] for key in ("onnxruntime-fp32", "openvino-fp32")},
    }  # fmt: skip
    (tmp_path / golden.FOLDER / golden.FILE).write_text(json.dumps(document))
    return tmp_path


def test_an_engine_is_compared_with_its_own_expectation_or_with_that_of_its_precision(bundle: Path) -> None:
    engine: Any = Fixed()
    own = golden.check(bundle, engine, info("onnxruntime", "1"))
    validate(own, golden.SelfTest)
    assert own["passed"] and own["against"] == "onnxruntime-fp32" and own["tolerance"]["box_px"] == 0.5
    assert own["compared"] == 3 and own["worst_box_px"] < 1e-5 and own["reason"] is None
    assert golden.check(bundle, engine, info("tensorrt", "1"))["tolerance"]["box_px"] == 2.0
    assert golden.check(bundle, engine, info("onnxruntime", "2"))["tolerance"]["box_px"] == 2.0, "another version"
    other = golden.check(bundle, engine, info("onnxruntime", "1", "cd"))
    assert other["tolerance"]["box_px"] == 2.0, "built from another ONNX file"
    engine.executed = "bf16"
    assert golden.check(bundle, engine, info("onnxruntime", "1"))["tolerance"]["box_px"] == 2.0, (
        "other arithmetic than there"
    )
    engine.precision = "int8"
    with pytest.raises(EngineError, match="no expected detections for int8"):
        golden.check(bundle, engine, info("tensorrt", "1"))


def test_a_failure_has_its_figures(bundle: Path) -> None:
    off: Any = Fixed(moved(0, 2, 4))
    found = golden.check(bundle, off, info("onnxruntime", "1"))
    assert not found["passed"] and found["reason"].startswith("one box off by 4 px (0.5 allowed)")
    assert not golden.check(bundle, off, info("tensorrt", "1"))["passed"]
    gone: Any = Fixed(A[1:])
    assert (
        golden.check(bundle, gone, info("onnxruntime", "1"))["reason"]
        == "boxes that only one of the two finds: 1 (0 allowed)"
    )


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": 2, "images": []}'])
def test_a_damaged_expectation_is_an_error(bundle: Path, text: str) -> None:
    (bundle / golden.FOLDER / golden.FILE).write_text(text)
    engine: Any = Fixed()
    with pytest.raises(EngineError, match="golden"):
        golden.check(bundle, engine, info("onnxruntime", "1"))
