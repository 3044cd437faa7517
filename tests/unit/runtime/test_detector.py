"""`Detector` gives, bit for bit, what its parts give one after another on arrays of their own."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import pytest

from yolo_compress.runtime.detect import pre
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.post import nms, to_image
from yolo_compress.runtime.errors import NotFinite

IMGSZ = (64, 96)
CLASSES, ANCHORS = 3, 200
SHAPES = [(64, 96), (30, 200), (200, 30), (48, 96), (64, 64), (128, 192), (1, 300), (480, 640), (7, 5)]


class Projected:
    """An output whose every number depends on every pixel of its image, so equal outputs mean equal inputs."""

    needs_nms = True

    def __init__(self, batch: int | None) -> None:
        self.names, self.imgsz, self.channels = ("a", "b", "c"), IMGSZ, 3
        self.batch, self.shapes = batch, list[tuple[int, ...]]()
        generator = np.random.default_rng(0)
        self.weights = generator.random((3 * IMGSZ[0] * IMGSZ[1], 16)) / 1e4
        self.mixed = generator.random((16, (4 + CLASSES) * ANCHORS))

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        self.shapes.append(images_BCHW.shape)
        rows = [image.reshape(1, -1).astype(np.float64) @ self.weights @ self.mixed for image in images_BCHW]
        output = np.concatenate(rows).reshape(len(images_BCHW), 4 + CLASSES, ANCHORS) % 1
        output[:, :4] *= 64
        return output.astype(np.float32)


def letterbox_by_copies(image: np.ndarray, imgsz: tuple[int, int]) -> tuple[np.ndarray, pre.Letterbox]:
    """The letterbox as it was first written: bytes on a grey canvas, then transposed, then divided."""
    height, width = image.shape[:2]
    scale = max(imgsz) / max(height, width)
    if scale != 1:
        sides = (min(math.ceil(height * scale), max(imgsz)), min(math.ceil(width * scale), max(imgsz)))
        image = cv2.resize(image, sides[::-1], interpolation=cv2.INTER_LINEAR)
    fit = min(imgsz[0] / image.shape[0], imgsz[1] / image.shape[1], 1.0)
    placed_h, placed_w = max(round(image.shape[0] * fit), 1), max(round(image.shape[1] * fit), 1)
    if (placed_h, placed_w) != image.shape[:2]:
        image = cv2.resize(image, (placed_w, placed_h), interpolation=cv2.INTER_LINEAR)
    top, left = round((imgsz[0] - placed_h) / 2 - 0.1), round((imgsz[1] - placed_w) / 2 - 0.1)
    canvas = np.full((*imgsz, 3), 114, np.uint8)
    canvas[top : top + placed_h, left : left + placed_w] = image
    chw = canvas.transpose(2, 0, 1).astype(np.float32)
    chw /= np.float32(255)
    return chw, pre.Letterbox((placed_h / height, placed_w / width), left, top, height, width)


def pictures() -> list[np.ndarray]:
    generator = np.random.default_rng(2)
    return [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES]


def by_parts(backend: Any, image: np.ndarray, conf: float, multi_label: bool) -> np.ndarray:
    chw, placed = letterbox_by_copies(image, IMGSZ)
    return to_image(nms(backend(np.stack([chw]))[0], conf, 0.7, 300, multi_label), placed)


@pytest.mark.parametrize("batch", [1, 2, 4, None])
@pytest.mark.parametrize(("conf", "multi_label"), [(0.25, False), (0.001, True)])
def test_a_detector_is_its_parts(batch: int | None, conf: float, multi_label: bool) -> None:
    detector = Detector(Projected(batch), conf, multi_label=multi_label)  # type: ignore[arg-type]
    images = pictures()
    expected = [by_parts(Projected(1), image, conf, multi_label) for image in images]
    assert all(map(len, expected)), "something to compare"
    for found in (detector.detect(images), detector.detect(images), [detector(image) for image in images]):
        assert all(map(np.array_equal, found, expected)), "also where the input held another image"
    size = batch or len(images)
    assert {shape[0] for shape in detector.backend.shapes} == ({size} if batch else {1, size})  # type: ignore[attr-defined]


@pytest.mark.parametrize("imgsz", [IMGSZ, (64, 64), (160, 96)])
def test_every_value_of_the_input_is_written(imgsz: tuple[int, int]) -> None:
    for image in [*pictures(), np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)]:
        chw = np.full((3, *imgsz), np.nan, np.float32)
        expected, where = letterbox_by_copies(image, imgsz)
        found, placed = pre.letterbox(image, imgsz, out=chw)
        assert found is chw and placed == where and np.array_equal(chw, expected)
        assert np.array_equal(pre.letterbox(image, imgsz)[0], expected)


def test_a_canvas_holds_each_image_as_if_it_were_the_first() -> None:
    generator = np.random.default_rng(3)
    canvas = pre.Canvas(np.full((2, 3, *IMGSZ), np.nan, np.float32))
    for shape in [(30, 200), (30, 200), (200, 30), (200, 30), (30, 200), (64, 96), (30, 200)]:
        image = generator.integers(0, 256, (*shape, 3), dtype=np.uint8)
        expected, where = letterbox_by_copies(image, IMGSZ)
        assert canvas.place(1, image) == where and np.array_equal(canvas.images_BCHW[1], expected)
    assert np.isnan(canvas.images_BCHW[0]).all(), "the other image's place is its own"


def test_a_view_of_an_image_is_an_image() -> None:
    image = pictures()[7]
    for view in (image[..., ::-1], image[::2, 10:-10], image.transpose(1, 0, 2)):
        copied = pre.letterbox(np.ascontiguousarray(view), IMGSZ)
        assert np.array_equal(pre.letterbox(view, IMGSZ)[0], copied[0])


def test_bytes_are_divided_in_float32_without_opencv_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    monkeypatch.setattr(pre, "_cv2", lambda: None)
    assert np.array_equal(
        pre.letterbox(ramp, (16, 16))[0][0].ravel(), np.arange(256, dtype=np.float32) / np.float32(255)
    )


@pytest.mark.parametrize("out", [np.empty((3, 64, 64), np.float32), np.empty((3, *IMGSZ))])
def test_an_input_of_another_form_is_refused(out: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected float32 \[3, 64, 96\]"):
        pre.letterbox(pictures()[0], IMGSZ, out)


@pytest.mark.parametrize(
    ("row", "value"), [(0, np.nan), (1, np.inf), (2, -np.inf), (3, np.nan), (4, np.nan), (5, np.inf), (5, np.nan)]
)
def test_one_bad_number_is_enough(row: int, value: float) -> None:
    class Broken(Projected):
        def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
            output = super().__call__(images_BCHW)
            output[0, row, 7] = value
            return output

    with pytest.raises(NotFinite):
        Detector(Broken(1))(pictures()[0])  # type: ignore[arg-type]


def test_boxes_that_need_no_nms_are_all_kept() -> None:
    class EndToEnd(Projected):
        needs_nms = False

    image = pictures()[0]
    kept, every = (Detector(kind(1), 0.001, iou=0.3)(image) for kind in (Projected, EndToEnd))  # type: ignore[arg-type]
    again = Detector(Projected(1), 0.001, iou=1.0)(image)  # type: ignore[arg-type]
    assert len(kept) < len(every) and np.array_equal(every, again)
