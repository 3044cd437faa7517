"""Gallery of validation images with the detections of both models side by side, as JPEG data in the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_compress.errors import DataError
from yolo_compress.report.charts.annotated_image import Marks, class_name, colour, jpeg_uri
from yolo_compress.report.image_choice import SECTIONS

COUNT = 12
WIDTH_PX = 480
# Most bytes of all images, encoded in base64. The whole page then stays below 6 MB.
BUDGET_BYTES = 4_000_000
# (width in px, JPEG quality), tried in this order until the images fit the budget.
SIZES = ((WIDTH_PX, 84), (WIDTH_PX, 72), (400, 68), (320, 62), (240, 55))
# Usual score threshold of deployment. mAP counts detections below it too, but they would fill the image with boxes.
MIN_SCORE = 0.25
MATCH_IOU = 0.5


@dataclass(frozen=True)
class Item:
    """A validation image with its objects and the detections of both models.

    Attributes:
        image: Path, or HW3 uint8 RGB.
        truths: Class and normalised xywh of each object, as in `data.samples.Sample.boxes`.
        detections_a: Detections of the baseline, N6: xyxy in px of the image, score, class.
        detections_b: Detections of the compressed model in the same form.
        names: Class names in the order of their index.
        name: Title of the image; None: file name.
        section: A key of `image_choice.SECTIONS`.
        min_score: Detections with this score or less are not drawn.
    """

    image: str | Path | NDArray[np.uint8]
    truths: Sequence[Sequence[float]]
    detections_a: NDArray[Any]
    detections_b: NDArray[Any]
    names: Sequence[str]
    name: str | None = None
    section: str = "random"
    min_score: float = MIN_SCORE


@dataclass(frozen=True)
class Side:
    """One model on one image. A detection finds an object of its class at IoU 0.5 or more."""

    uri: str
    found: int  # objects that a detection finds
    missed: int  # objects that no detection finds
    extra: int  # detections that find no object
    lost: int = 0  # only of the compressed model: missed objects that the baseline finds
    new: int = 0  # only of the compressed model: extra detections that the baseline does not have


@dataclass(frozen=True)
class Pair:
    """Both models on one image. `section` is a key of `image_choice.SECTIONS`; `width` and `height` are in px."""

    section: str
    name: str
    width: int
    height: int
    baseline: Side
    compressed: Side


@dataclass(frozen=True)
class Gallery:
    """Image pairs, and a legend: (class name, colour) of the classes that occur, in the order of their index."""

    pairs: tuple[Pair, ...]
    legend: tuple[tuple[str, str], ...]

    def sections(self) -> list[tuple[str, str, list[Pair]]]:
        """Return (title, description, pairs) of each section that has images."""
        parts = [(SECTIONS[key], [pair for pair in self.pairs if pair.section == key]) for key in SECTIONS]
        return [(title, text, pairs) for (title, text), pairs in parts if pairs]


def draw(items: Sequence[Item], count: int = COUNT) -> Gallery:
    """Draw the first `count` items. Reduce size and JPEG quality until all fit BUDGET_BYTES.

    Raises:
        DataError: An image cannot be read.
    """
    chosen = [_loaded(item) for item in items[:count]]
    pairs: tuple[Pair, ...] = ()
    for width_px, quality in SIZES:
        pairs = tuple(_pair(item, width_px, quality) for item in chosen)
        if sum(len(side.uri) for pair in pairs for side in (pair.baseline, pair.compressed)) <= BUDGET_BYTES:
            break
    return Gallery(pairs, _legend(chosen))


@dataclass(frozen=True)
class _Loaded:
    """An item with its image in memory. truths_N5 is class, xyxy in px. Only shown detections remain, best score first."""

    image_HW3: NDArray[np.uint8]
    truths_N5: NDArray[Any]
    a_N6: NDArray[Any]
    b_N6: NDArray[Any]
    names: Sequence[str]
    name: str
    section: str


def _loaded(item: Item) -> _Loaded:
    image_HW3, name = item.image, item.name
    if isinstance(image_HW3, (str, Path)):
        name, image_HW3 = name or Path(image_HW3).name, _read(Path(image_HW3))
    height, width = image_HW3.shape[:2]
    truths = [
        [cls, (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
        for cls, x, y, w, h in item.truths
    ]
    return _Loaded(
        image_HW3,
        np.asarray(truths, float).reshape(-1, 5),
        _shown(item.detections_a, item.min_score),
        _shown(item.detections_b, item.min_score),
        item.names,
        str(name or "image"),
        item.section,
    )


def _read(file: Path) -> NDArray[np.uint8]:
    """Read an image as HW3 RGB. The EXIF orientation is applied, because the boxes refer to the rotated image."""
    try:
        data = np.frombuffer(file.read_bytes(), np.uint8)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}, so the report cannot show it") from error
    bgr_HW3 = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if bgr_HW3 is None:
        raise DataError(f"{file}: cannot be decoded as an image, so the report cannot show it")
    return np.asarray(cv2.cvtColor(bgr_HW3, cv2.COLOR_BGR2RGB), np.uint8)


def _shown(detections: NDArray[Any], min_score: float) -> NDArray[Any]:
    boxes_N6 = np.asarray(detections, float).reshape(-1, 6)
    boxes_N6 = boxes_N6[boxes_N6[:, 4] > min_score]  # same comparison as in `post.nms`
    return boxes_N6[np.argsort(-boxes_N6[:, 4], kind="stable")]


def _pair(item: _Loaded, width_px: int, quality: int) -> Pair:
    height, width = item.image_HW3.shape[:2]
    found_a, used_a = match(item.truths_N5, item.a_N6)
    found_b, used_b = match(item.truths_N5, item.b_N6)
    _, in_both = match(np.column_stack([item.a_N6[:, 5], item.a_N6[:, :4]]), item.b_N6)
    nothing = np.zeros(len(item.truths_N5), bool), np.zeros(len(item.a_N6), bool)
    marks_a = Marks(found_a, used_a, *nothing)
    marks_b = Marks(found_b, used_b, lost=found_a & ~found_b, new=~used_b & ~in_both)
    baseline = _side(item, item.a_N6, marks_a, width_px, quality)
    compressed = _side(item, item.b_N6, marks_b, width_px, quality)
    return Pair(item.section, item.name, width, height, baseline, compressed)


def _side(item: _Loaded, detections_N6: NDArray[Any], marks: Marks, width_px: int, quality: int) -> Side:
    uri = jpeg_uri(item.image_HW3, item.truths_N5, detections_N6, marks, item.names, width_px, quality)
    counts = (marks.found.sum(), (~marks.found).sum(), (~marks.used).sum(), marks.lost.sum(), marks.new.sum())
    return Side(uri, *map(int, counts))


def match(truths_N5: NDArray[Any], detections_N6: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Match detections to objects of the same class, greedily by score. An object is matched at most once.

    Args:
        truths_N5: Class, xyxy.
        detections_N6: xyxy, score, class, best score first. Same coordinates as `truths_N5`.

    Returns:
        Flags of the objects that were found, and flags of the detections that found one.
    """
    found = np.zeros(len(truths_N5), bool)
    used = np.zeros(len(detections_N6), bool)
    for index, box in enumerate(detections_N6):
        low = np.maximum(truths_N5[:, 1:3], box[:2])
        high = np.minimum(truths_N5[:, 3:5], box[2:4])
        overlap = np.prod(np.clip(high - low, 0, None), axis=1)
        areas = np.prod(truths_N5[:, 3:5] - truths_N5[:, 1:3], axis=1) + np.prod(box[2:4] - box[:2])
        iou = overlap / np.maximum(areas - overlap, 1e-9)
        iou[found | (truths_N5[:, 0] != box[5])] = -1
        if len(iou) and iou.max() >= MATCH_IOU:
            found[int(iou.argmax())] = used[index] = True
    return found, used


def _legend(items: Sequence[_Loaded]) -> tuple[tuple[str, str], ...]:
    names: dict[int, str] = {}
    for item in items:
        classes = [item.truths_N5[:, 0], item.a_N6[:, 5], item.b_N6[:, 5]]
        for cls in np.unique(np.concatenate(classes)).astype(int):
            names[cls] = class_name(item.names, cls)
    return tuple((names[cls], colour(cls)) for cls in sorted(names))
