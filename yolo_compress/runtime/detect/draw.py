"""Show detections: as a JSON line, or drawn on the image with Pillow or OpenCV, whichever is installed."""

from __future__ import annotations

import colorsys
import io
import json
from pathlib import Path
from typing import Any, Sequence, Tuple

import numpy as np

from ..errors import RuntimeUnavailable
from ..secure.signed_manifest import written
from .stream import ImageDetections

GOLDEN_ANGLE = 0.618034  # step on the colour circle, which gives neighbouring classes very different colours


def line(found: ImageDetections, names: Sequence[str]) -> str:
    """Return the detections of an image as a JSON line, best first. Boxes are x1, y1, x2, y2 in px of the image."""
    if found.image_HW3 is None:
        return json.dumps({"picture": found.name, "problem": found.problem})
    height, width = found.image_HW3.shape[:2]
    boxes = [
        {"class": names[int(row[5])], "score": round(row[4], 4), "box": [round(side, 2) for side in row[:4]]}
        for row in found.detections_N6.tolist()
    ]
    return json.dumps({"picture": found.name, "width": width, "height": height, "detections": boxes})


def colour(label: int) -> Tuple[int, int, int]:
    """Return the RGB colour of a class index."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN_ANGLE % 1, 0.75, 1.0)
    return int(255 * red), int(255 * green), int(255 * blue)


def write_drawing(path: Path, image_HW3: np.ndarray, detections_N6: np.ndarray, names: Sequence[str]) -> None:
    """Write a JPEG of the image with boxes, classes and scores. If it fails, no file is left.

    Raises:
        OSError: the file cannot be written.
        RuntimeUnavailable: neither Pillow nor OpenCV is installed.
    """
    marks = [
        (tuple(round(side) for side in row[:4]), f"{names[int(row[5])]} {row[4]:.2f}", colour(int(row[5])))
        for row in detections_N6.tolist()
    ]
    thick = max(2, round(max(image_HW3.shape) / 400))
    for encode in (_with_pillow, _with_cv2):
        try:
            jpeg = encode(image_HW3, marks, thick)
        except ImportError:
            continue
        written(path, jpeg, synced=False)  # not by Pillow, which ignores incomplete writes
        return
    raise RuntimeUnavailable("drawing needs Pillow or OpenCV", "pip install pillow")


def _with_pillow(image_HW3: np.ndarray, marks: Sequence[Any], thick: int) -> bytes:
    from PIL import Image, ImageDraw

    canvas = Image.fromarray(image_HW3)
    pen = ImageDraw.Draw(canvas)
    for (x1, y1, x2, y2), text, rgb in marks:
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=rgb, width=thick)
        pen.rectangle(pen.textbbox((x1 + thick, y1 + thick), text), fill=rgb)
        pen.text((x1 + thick, y1 + thick), text, fill="black")
    stream = io.BytesIO()
    canvas.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _with_cv2(image_HW3: np.ndarray, marks: Sequence[Any], thick: int) -> bytes:
    import cv2

    canvas = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2BGR)
    for (x1, y1, x2, y2), text, rgb in marks:
        cv2.rectangle(canvas, (x1, y1), (max(x1, x2 - 1), max(y1, y2 - 1)), rgb[::-1], thick)
        cv2.putText(
            canvas, text, (x1 + thick, y1 + 12 + thick), cv2.FONT_HERSHEY_SIMPLEX, 0.4, rgb[::-1], 1, cv2.LINE_AA
        )
    return bytes(cv2.imencode(".jpg", canvas, [cv2.IMWRITE_JPEG_QUALITY, 90])[1])
