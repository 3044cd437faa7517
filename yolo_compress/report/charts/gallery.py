"""Validation images with the detections of both models side by side, as JPEG data in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from yolo_compress.errors import DataError
from yolo_compress.report.image_choice import SECTIONS

COUNT = 12
WIDTH_PX = 480
# With plots and tables the file stays below 6 MB; base64 adds a third.
BUDGET_BYTES = 4_000_000
# Tried in turn until the pictures fit the budget: width in px, JPEG quality.
SIZES = ((WIDTH_PX, 84), (WIDTH_PX, 72), (400, 68), (320, 62), (240, 55))
# What a user of the model sees; below it mAP counts on, but a picture would drown in boxes.
MIN_SCORE = 0.25
MATCH_IOU = 0.5
# Times as tall as wide; a taller image is drawn narrower (a JPEG has 65,500 rows at most).
MOST_UPRIGHT = 4
# Above this many boxes a tag holds the score only; the colour says the class.
NAMED = 8
# Okabe and Ito's colours without black, told apart with any colour vision.
PALETTE = ("#56b4e9", "#e69f00", "#00c08b", "#f0e442", "#cc79a7", "#d55e00", "#0072b2")
TRUTH, MISSED, RIM = "#ffffff", "#ff2d55", "#000000"


@dataclass(frozen=True)
class Picture:
    """One model on one image; `found`, `missed` and `extra` at IoU 0.5 and MIN_SCORE, class for class.

    Of the compressed model also `lost`, objects that the original found, and `new`, extra detections that it has not.
    """

    uri: str
    found: int
    missed: int
    extra: int
    lost: int = 0
    new: int = 0


@dataclass(frozen=True)
class Pair:
    """`section`: a key of `choice.SECTIONS`."""

    section: str
    name: str
    width: int
    height: int
    original: Picture
    compressed: Picture


@dataclass(frozen=True)
class Gallery:
    """`legend`: (class name, colour) of the classes that occur, in class order."""

    pairs: tuple[Pair, ...]
    legend: tuple[tuple[str, str], ...]

    def sections(self) -> list[tuple[str, str, list[Pair]]]:
        """Title, what it shows, and its pairs."""
        parts = [(SECTIONS[key], [pair for pair in self.pairs if pair.section == key]) for key in SECTIONS]
        return [(title, text, pairs) for (title, text), pairs in parts if pairs]


def draw(items: Sequence[Mapping[str, Any]], count: int = COUNT) -> Gallery:
    """Draws the first `count` items, smaller or coarser when there are many.

    Args:
        items: `image` (path, or HW3 uint8 RGB), `name` (optional, else the file's), `truths` (class and normalised
            xywh, as a Sample's boxes), `detections_a` of the original and `detections_b` of the compressed model
            (N6: xyxy in px of that image, score, class), `names` (class names), optional `section` (a key of
            `choice.SECTIONS`, else random) and `min_score`.

    Raises:
        DataError: an image that cannot be read.
    """
    chosen = [_loaded(item) for item in items[:count]]
    pairs: tuple[Pair, ...] = ()
    for width_px, quality in SIZES:
        pairs = tuple(_pair(item, width_px, quality) for item in chosen)
        if sum(len(picture.uri) for pair in pairs for picture in (pair.original, pair.compressed)) <= BUDGET_BYTES:
            break
    return Gallery(pairs, _legend(chosen))


def _loaded(item: Mapping[str, Any]) -> dict[str, Any]:
    image, name = item["image"], item.get("name")
    if isinstance(image, (str, Path)):
        name = name or Path(image).name
        try:
            data = np.frombuffer(Path(image).read_bytes(), np.uint8)
        except OSError as error:
            raise DataError(f"{image}: {error.strerror}, so the report cannot show it") from error
        # EXIF orientation applied, as in every reader whose boxes arrive here.
        bgr = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
        if bgr is None:
            raise DataError(f"{image}: cannot be decoded as an image, so the report cannot show it")
        image = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    height, width = image.shape[:2]
    truths = np.asarray(
        [
            [cls, (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            for cls, x, y, w, h in item["truths"]
        ],
        float,
    ).reshape(-1, 5)
    shown = {}
    for key in ("detections_a", "detections_b"):
        boxes = np.asarray(item[key], float).reshape(-1, 6)
        boxes = boxes[boxes[:, 4] > item.get("min_score", MIN_SCORE)]  # as `post.nms` compares
        shown[key] = boxes[np.argsort(-boxes[:, 4], kind="stable")]
    about = {"name": str(name or "image"), "names": item["names"], "section": item.get("section", "random")}
    return {"image": image, "truths": truths, **about, **shown}


def _pair(item: Mapping[str, Any], width_px: int, quality: int) -> Pair:
    height, width = item["image"].shape[:2]
    truths_N5, first_N6, second_N6 = (item[key] for key in ("truths", "detections_a", "detections_b"))
    found, used = match(truths_N5, first_N6)
    found_b, used_b = match(truths_N5, second_N6)
    _, paired = match(np.column_stack([first_N6[:, 5], first_N6[:, :4]]), second_N6)
    nothing = np.zeros(len(truths_N5), bool), np.zeros(len(first_N6), bool)
    original = _picture(item, first_N6, _Judged(found, used, *nothing), width_px, quality)
    judged = _Judged(found_b, used_b, found & ~found_b, ~used_b & ~paired)
    compressed = _picture(item, second_N6, judged, width_px, quality)
    return Pair(item["section"], item["name"], width, height, original, compressed)


class _Judged(NamedTuple):
    """Truths found, and of the others those lost; detections that found one, and of the others those that are new."""

    found: NDArray[np.bool_]
    used: NDArray[np.bool_]
    lost: NDArray[np.bool_]
    new: NDArray[np.bool_]


def _picture(
    item: Mapping[str, Any], detections_N6: NDArray[Any], judged: _Judged, width_px: int, quality: int
) -> Picture:
    image, truths_N5 = item["image"], item["truths"]
    scale = min(1.0, MOST_UPRIGHT * image.shape[1] / image.shape[0]) * width_px / image.shape[1]
    canvas = _resized(image, scale)
    pen = ImageDraw.Draw(canvas)
    font = _font(max(11, width_px // 27))
    for truth, hit in zip(truths_N5, judged.found, strict=True):
        _rectangle(pen, truth[1:] * scale, TRUTH if hit else MISSED, 1 if hit else 3)
    for box, hit in zip(detections_N6, judged.used, strict=True):
        if not hit:
            _rectangle(pen, box[:4] * scale + (-2, -2, 2, 2), RIM, 6)
        _rectangle(pen, box[:4] * scale, colour(int(box[5])), 2)
    placed: list[tuple[float, ...]] = []
    for truth in truths_N5[judged.lost]:
        _tag(pen, canvas.size, truth[1:] * scale, "lost", MISSED, font, placed)
    names = item["names"] if len(detections_N6) <= NAMED else None
    for box, new in zip(detections_N6, judged.new, strict=True):
        text = f"{box[4]:.2f}".removeprefix("0") if names is None else f"{_name(names, int(box[5]))[:24]} {box[4]:.2f}"
        _tag(pen, canvas.size, box[:4] * scale, f"new {text}" if new else text, colour(int(box[5])), font, placed)
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=quality, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    counts = (judged.found.sum(), (~judged.found).sum(), (~judged.used).sum(), judged.lost.sum(), judged.new.sum())
    return Picture(uri, *map(int, counts))


def _resized(image: NDArray[Any], scale: float) -> Image.Image:
    """Enlarged pixels stay sharp at whole factors (what the network saw), everything else is interpolated."""
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    method = Image.Resampling.NEAREST if scale >= 2 and scale == int(scale) else Image.Resampling.LANCZOS
    return Image.fromarray(np.ascontiguousarray(image, np.uint8)).resize(size, method)


def match(truths_N5: NDArray[Any], detections_N6: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Greedy by score within a class, each truth once.

    Args:
        truths_N5: class, xyxy.
        detections_N6: xyxy, score, class, the best score first; same frame.

    Returns:
        Which truths were found, which detections found one.
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


def colour(cls: int) -> str:
    return PALETTE[cls % len(PALETTE)]


def _rectangle(pen: ImageDraw.ImageDraw, xyxy: NDArray[Any], outline: str, width: int) -> None:
    x0, y0, x1, y1 = (float(value) for value in xyxy)
    pen.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline=outline, width=width)


def _tag(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    xyxy: NDArray[Any],
    text: str,
    fill: str,
    font: Any,
    placed: list[tuple[float, ...]],
) -> None:
    """Above the box, below it, or inside; left out where it would cover another tag or be wider than the picture."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 5
    x0, y0, y1 = float(xyxy[0]), float(xyxy[1]), float(xyxy[3])
    if width > size[0]:
        return
    x0 = min(max(0.0, x0), size[0] - width)
    for y in (y0 - height, y0, y1, y1 - height):
        spot = (x0, y, x0 + width, y + height)
        free = all(spot[2] <= o[0] or o[2] <= spot[0] or spot[3] <= o[1] or o[3] <= spot[1] for o in placed)
        if y >= 0 and y + height <= size[1] and free:
            placed.append(spot)
            pen.rectangle(spot, fill=fill)
            dark = sum(int(fill[i : i + 2], 16) * w for i, w in ((1, 3), (3, 6), (5, 1))) > 1100
            pen.text((x0 + 3 - left, y + 2 - top), text, fill="#000000" if dark else "#ffffff", font=font)
            return


def _font(size: int) -> Any:
    """Matplotlib ships DejaVu Sans: the same letters on every machine, and more scripts than Pillow's own font."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def _name(names: Sequence[str], cls: int) -> str:
    return " ".join(str(names[cls]).split()) if 0 <= cls < len(names) else str(cls)


def _legend(items: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    names: dict[int, str] = {}
    for item in items:
        classes = [item["truths"][:, 0], item["detections_a"][:, 5], item["detections_b"][:, 5]]
        for cls in np.unique(np.concatenate(classes)).astype(int):
            names[cls] = _name(item["names"], cls)
    return tuple((names[cls], colour(cls)) for cls in sorted(names))
