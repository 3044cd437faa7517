"""A cascade's detections are those of one of its engines, and which one does not depend on who asks."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yolo_compress.runtime.detect.cascade import FEATURES, CascadeEngine, Part, Policy, features, read_policy
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.sources import SourceImage
from yolo_compress.runtime.detect.stream import Pipeline
from yolo_compress.runtime.errors import EngineError, NotFinite

PART = Part("small", "0" * 64, "fp32", (32, 32))


class Engine:
    """Random candidates, of which those in bright images have high scores. It counts the images that it sees."""

    names, channels, precision, executed, threads, needs_nms = ("bolt", "nut"), 3, "fp32", "fp32", 1, True

    def __init__(self, side: int, batch: int | None = 1, seed: int = 0) -> None:
        self.imgsz, self.batch, self.seed, self.seen, self.closed = (side, side), batch, seed, 0, False

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        self.seen += len(images_BCHW)
        outputs = []
        for image in images_BCHW:
            level = float(image.max())
            generator = np.random.default_rng(self.seed + int(255 * level))
            output = generator.uniform(4, 28, (6, 40)) * self.imgsz[0] / 32
            output[4:] = generator.uniform(0, 1, (2, 40)) * level
            outputs.append(output)
        return np.stack(outputs).astype(np.float32)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.closed = True


def policy(threshold: float) -> Policy:
    """Hand over the images with few shown detections: dark ones."""
    weights = np.zeros(len(FEATURES))
    weights[FEATURES.index("mean_score")] = -1
    return Policy(PART, PART, Engine.names, weights, 0.0, threshold)


def shades(count: int = 24) -> list[np.ndarray]:
    return [np.full((32, 48, 3), 250 - 8 * i, np.uint8) for i in range(count)]


def mean_scores() -> np.ndarray:
    engine = CascadeEngine(Engine(32), Engine(64), policy(0))  # type: ignore[arg-type]
    found = [Detector(engine.small, 0.05, multi_label=False)(image) for image in shades()]
    return np.array([features(rows, 32, 48)[FEATURES.index("mean_score")] for rows in found])


THRESHOLD = -float(np.median(mean_scores()))


@pytest.mark.parametrize("batch", [1, None, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"conf": 0.25, "multi_label": False},
        {"conf": 0.01, "multi_label": False},
        {"conf": 0.5, "iou": 0.3, "multi_label": False},
        {"conf": 0.3, "max_det": 2, "multi_label": False},
    ],
)
def test_each_image_has_the_detections_of_one_engine(batch: int | None, settings: dict[str, Any]) -> None:
    small, large = Engine(32, batch), Engine(64, batch, seed=7)
    alone = [Detector(Engine(32), **settings), Detector(Engine(64, seed=7), **settings)]  # type: ignore[arg-type]
    needs = [bool(-score > THRESHOLD) for score in mean_scores()]
    assert 6 < sum(needs) < 18
    found = Detector(CascadeEngine(small, large, policy(THRESHOLD)), **settings).detect(shades())  # type: ignore[arg-type]
    for image, rows, need in zip(shades(), found, needs, strict=True):
        assert np.array_equal(rows, alone[need](image)), "the settings decide what is shown, not where it comes from"
    if batch == 1:
        assert (small.seen, large.seen) == (len(needs), sum(needs))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_pipeline_gives_the_same(batch: int) -> None:
    engines: list[Engine] = []

    def opens(side: int, seed: int) -> Engine:
        engines.append(Engine(side, batch, seed))
        return engines[-1]

    images = [SourceImage(str(i), partial(np.asarray, image)) for i, image in enumerate(shades())]
    one = CascadeEngine(Engine(32), Engine(64, seed=7), policy(THRESHOLD))  # type: ignore[arg-type]
    alone = Detector(one, 0.25, multi_label=False)
    small, large = [partial(opens, 32, 0)] * 2, [partial(opens, 64, 7)] * 2
    with Pipeline(small, opens_large=large, policy=policy(THRESHOLD)) as pipeline:
        found = list(pipeline(images))
    assert [one.name for one in found] == [image.name for image in images]
    for result, image in zip(found, shades(), strict=True):
        assert np.array_equal(result.detections_N6, alone(image))
    assert len(engines) == 4 and all(engine.closed for engine in engines)


def test_an_engine_that_fails_to_open_closes_the_others() -> None:
    first = Engine(32)

    def fails() -> Engine:
        raise EngineError("torn")

    with pytest.raises(EngineError, match="torn"):
        Pipeline([lambda: first], opens_large=[fails], policy=policy(0))
    assert first.closed


def test_a_cascade_closes_both_engines_and_has_no_output() -> None:
    small, large = Engine(32), Engine(64)
    with CascadeEngine(small, large, policy(0)) as engine:  # type: ignore[arg-type]
        assert engine.imgsz == (32, 32) and engine.executed == "fp32 then fp32" and engine.precision == "fp32"
        image = np.zeros((1, 3, 32, 32), np.float32)
        for use in (lambda: engine(image), lambda: engine.bind(image), lambda: engine.node_ms(1)):
            with pytest.raises(EngineError, match="a cascade has no output of one engine"):
                use()
    assert small.closed and large.closed


def test_nan_of_either_model_is_an_error() -> None:
    class Torn(Engine):
        def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
            return np.full((len(images_BCHW), 6, 4), np.nan, np.float32)

    for pair in ((Torn(32), Engine(64)), (Engine(32), Torn(64))):
        with pytest.raises(NotFinite):
            Detector(CascadeEngine(*pair, policy(-9)))(shades()[0])  # type: ignore[arg-type]


def test_features_of_boxes_whose_answer_is_known() -> None:
    rows = np.array([[0, 0, 10, 10, 0.5, 0], [1, 0, 11, 10, 0.9, 1], [50, 50, 70, 70, 0.1, 0]], np.float32)
    named = dict(zip(FEATURES, features(rows, 100, 100), strict=True))
    assert named["shown"] == pytest.approx(np.log(3)) and named["doubtful"] == pytest.approx(np.log(2))
    assert named["doubt"] == pytest.approx(np.log1p(1 + 4 * 0.09 + 4 * 0.09))
    assert named["mean_score"] == pytest.approx(0.7) and named["contested"] == pytest.approx(2 / 3)
    assert named["mean_side"] == pytest.approx((0.1 + 0.1 + 0.2) / 3) and named["least_side"] == pytest.approx(0.1)
    assert features(rows[:0], 100, 100).tolist() == [0, 0, 0, 0, 1, 1, 0]
    flat = np.array([[5, 5, 5, 5, 0.9, 0], [5, 5, 5, 5, 0.8, 0]], np.float32)
    assert np.isfinite(features(flat, 100, 100)).all()
    many = np.tile(rows[:1], (300, 1))
    assert np.array_equal(features(many, 100, 100), features(many[:64], 100, 100))


def document(**changes: Any) -> dict[str, Any]:
    part = {"folder": "small", "onnx_sha256": "0" * 64, "precision": "fp32", "imgsz": [32, 32]}
    return {
        "schema": 1,
        "small": part,
        "large": {**part, "folder": "large"},
        "names": ["bolt", "nut"],
        "features": list(FEATURES),
        "weights": [0.5] * len(FEATURES),
        "bias": 0.1,
        "threshold": 0.2,
        **changes,
    }


def test_a_policy_is_read_as_written(tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text(json.dumps(document()))
    read = read_policy(tmp_path)
    assert read.small == PART and read.large.folder == "large" and read.names == ("bolt", "nut")
    assert (read.bias, read.threshold) == (0.1, 0.2) and read.weights_F.tolist() == [0.5] * len(FEATURES)


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"features": ["shown"]},
        {"weights": [0.5]},
        {"weights": ["much"] * len(FEATURES)},
        {"names": "bolt"},
        {"bias": None},
        {"threshold": [1]},
        {"small": {"folder": "../small", "onnx_sha256": "0", "precision": "fp32", "imgsz": [32, 32]}},
        {"large": {"folder": "small", "onnx_sha256": "0", "precision": "fp32", "imgsz": [32, 32]}},
        {"large": None},
        {"large": {"folder": "large", "onnx_sha256": "0", "precision": "fp32", "imgsz": [32]}},
    ],
)
def test_a_damaged_policy_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "policy.json").write_text(json.dumps(document(**changes)))
    with pytest.raises(EngineError, match="damaged or of another version"):
        read_policy(tmp_path)
    with pytest.raises(EngineError, match="No such file"):
        read_policy(tmp_path / "gone")
