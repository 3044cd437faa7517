"""Draw objects, detections and their tags on an image, and encode it as JPEG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Largest height / width at full width. A taller image is drawn narrower, because a JPEG has at most 65,500 rows.
MAX_ASPECT = 4
# Up to this number of boxes a tag has class name and score, above it the score only.
MAX_NAMED_BOXES = 8
# Colours of Okabe and Ito without black. People with colour vision deficiency can distinguish them.
PALETTE = ("#56b4e9", "#e69f00", "#00c08b", "#f0e442", "#cc79a7", "#d55e00", "#0072b2")
TRUTH, MISSED, RIM = "#ffffff", "#ff2d55", "#000000"


class Marks(NamedTuple):
    """Flags of each object (`found`, `lost`) and of each detection (`used`, `new`) in an image."""

    found: NDArray[np.bool_]  # a detection of this model finds the object
    used: NDArray[np.bool_]  # the detection finds an object
    lost: NDArray[np.bool_]  # only the baseline finds the object
    new: NDArray[np.bool_]  # the detection finds no object, and the baseline does not have it


def jpeg_uri(
    image_HW3: NDArray[np.uint8],
    truths_N5: NDArray[Any],
    detections_N6: NDArray[Any],
    marks: Marks,
    names: Sequence[str],
    width_px: int,
    quality: int,
) -> str:
    """Draw the boxes and return the JPEG as a `data:` URI.

    Args:
        image_HW3: (H, W, 3) uint8 RGB array.
        truths_N5: (N, 5) array, columns class, x1, y1, x2, y2 in px of the image.
        detections_N6: (N, 6) array, columns x1, y1, x2, y2 in px of the image, score, class.
        marks: Flags of the objects and detections.
        names: Class names in the order of their index.
        width_px: Width of the JPEG. A very tall image becomes narrower.
        quality: JPEG quality, 1 to 95.
    """
    scale = min(1.0, MAX_ASPECT * image_HW3.shape[1] / image_HW3.shape[0]) * width_px / image_HW3.shape[1]
    canvas = _resized(image_HW3, scale)
    pen = ImageDraw.Draw(canvas)
    for truth, hit in zip(truths_N5, marks.found, strict=True):
        _rectangle(pen, truth[1:] * scale, TRUTH if hit else MISSED, 1 if hit else 3)
    for box, hit in zip(detections_N6, marks.used, strict=True):
        if not hit:
            _rectangle(pen, box[:4] * scale + (-2, -2, 2, 2), RIM, 6)
        _rectangle(pen, box[:4] * scale, colour(int(box[5])), 2)
    tags = _Tags(pen, canvas.size, _font(max(11, width_px // 27)))
    for truth in truths_N5[marks.lost]:
        tags.add(truth[1:] * scale, "lost", MISSED)
    named = len(detections_N6) <= MAX_NAMED_BOXES
    for box, new in zip(detections_N6, marks.new, strict=True):
        score = f"{box[4]:.2f}"
        text = f"{class_name(names, int(box[5]))[:24]} {score}" if named else score.removeprefix("0")
        tags.add(box[:4] * scale, f"new {text}" if new else text, colour(int(box[5])))
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def colour(cls: int) -> str:
    return PALETTE[cls % len(PALETTE)]


def class_name(names: Sequence[str], cls: int) -> str:
    """Return the name of a class on one line, or its index if it has no name."""
    return " ".join(str(names[cls]).split()) if 0 <= cls < len(names) else str(cls)


def _resized(image: NDArray[Any], scale: float) -> Image.Image:
    """Resize the image. For integer factors of 2 or more, pixels are repeated, as the model saw them. Other factors interpolate."""
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    method = Image.Resampling.NEAREST if scale >= 2 and scale == int(scale) else Image.Resampling.LANCZOS
    return Image.fromarray(np.ascontiguousarray(image, np.uint8)).resize(size, method)


def _rectangle(pen: ImageDraw.ImageDraw, xyxy: NDArray[Any], outline: str, width: int) -> None:
    x0, y0, x1, y1 = (float(value) for value in xyxy)
    pen.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline=outline, width=width)


class _Tags:
    """Draw texts at boxes so that no text covers another."""

    def __init__(self, pen: ImageDraw.ImageDraw, size: tuple[int, int], font: Any) -> None:
        self._pen, self._size, self._font = pen, size, font
        self._placed: list[tuple[float, float, float, float]] = []

    def add(self, xyxy: NDArray[Any], text: str, fill: str) -> None:
        """Draw a text above, in or below the box. A text that would cover another text, or is wider than the image, is not drawn."""
        left, top, right, bottom = self._pen.textbbox((0, 0), text, font=self._font)
        width, height = right - left + 6, bottom - top + 5
        x0, y0, y1 = float(xyxy[0]), float(xyxy[1]), float(xyxy[3])
        if width > self._size[0]:
            return
        x0 = min(max(0.0, x0), self._size[0] - width)
        for y in (y0 - height, y0, y1, y1 - height):
            spot = (x0, y, x0 + width, y + height)
            if y >= 0 and y + height <= self._size[1] and self._is_free(spot):
                self._placed.append(spot)
                self._pen.rectangle(spot, fill=fill)
                light = sum(int(fill[i : i + 2], 16) * w for i, w in ((1, 3), (3, 6), (5, 1))) > 1100
                ink = "#000000" if light else "#ffffff"
                self._pen.text((x0 + 3 - left, y + 2 - top), text, fill=ink, font=self._font)
                return

    def _is_free(self, spot: tuple[float, float, float, float]) -> bool:
        return all(
            spot[2] <= other[0] or other[2] <= spot[0] or spot[3] <= other[1] or other[3] <= spot[1]
            for other in self._placed
        )


def _font(size: int) -> Any:
    """Return DejaVu Sans from matplotlib. This font is equal on every machine, and has more scripts than Pillow's own font."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)
