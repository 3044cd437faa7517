"""Parse a label file in the YOLO detection format, with the rules of Ultralytics 8.4.190 (verify_image_label).

A row is `class x_centre y_centre width height`, or `class x1 y1 x2 y2 x3 y3 ...` in a file of polygons. The numbers are
fractions of the image. As in Ultralytics:

- If a row has more than six columns, the file holds polygons. The box of a polygon is the extremes of its points.
- Numbers may be outside 0..1 by 0.01. They are clipped here.
- Repeated rows are dropped.
- An empty or absent file means a background image.

Three things are findings here, although Ultralytics trains on them: a box without area, a point outside the image, and a file with
too many rows. If Ultralytics rejects a file, it drops the image and continues.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Tuple

Box = Tuple[int, float, float, float, float]  # class, x centre, y centre, width, height as fractions of the image

TOLERANCE = 0.01  # as Ultralytics, for annotation tools that round outwards
MAX_ROWS = 10_000  # objects in one image; COCO has at most 93, and Ultralytics reports at most 300 detections per image
MAX_FINDINGS = 20  # findings listed per file, so that a bad file does not hide the others
MAX_BYTES = 32 << 20


@dataclass
class Labels:
    """Contents of a label file: boxes in file order, errors (`findings`) and notes. An error or note is (line, text)."""

    boxes: List[Box] = field(default_factory=list)
    findings: List[Tuple[int, str]] = field(default_factory=list)
    notes: List[Tuple[int, str]] = field(default_factory=list)


def label_path(image: Path) -> Path:
    """Return the label file of an image; see `label_file`."""
    return Path(label_file(image.as_posix()))


def label_file(image: str) -> str:
    """Return the label file of an image: the last folder `images` becomes `labels`, and the suffix .txt (img2label_paths)."""
    path = "/labels/".join(image.rsplit("/images/", 1))
    return path[: path.rindex(".")] + ".txt"


def parse(data: bytes, classes: int, pose_columns: int = 0) -> Labels:
    """Parse the bytes of a label file.

    Args:
        classes: number of classes.
        pose_columns: number of keypoint columns at the end of a row, which are dropped.
    """
    out = Labels()
    if len(data) > MAX_BYTES:
        out.findings.append((1, f"{len(data) >> 20} MiB is no label file"))
        return out
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        out.findings.append((line, f"not UTF-8 text (byte {data[e.start]:#04x})"))
        return out
    lines = text.splitlines()
    if len(lines) > MAX_ROWS:
        out.findings.append((MAX_ROWS + 1, f"{len(lines)} rows, over the {MAX_ROWS} that one image may have"))
        return out
    rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    if pose_columns:
        rows = [(number, row[:5] if len(row) == 5 + pose_columns else row) for number, row in rows]
    polygons = any(len(row) > 6 for _, row in rows)
    seen: Dict[bytes, int] = {}
    for number, row in rows:
        try:
            box, values = _row(row, classes, polygons)
        except ValueError as e:
            out.findings.append((number, str(e)))
            continue
        first = seen.setdefault(struct.pack(f"{len(values)}f", *values), number)  # float32, as Ultralytics compares
        if first == number:
            out.boxes.append(box)
        else:
            out.notes.append((number, f"same as line {first}, dropped"))
    if len(out.findings) > MAX_FINDINGS:
        more = len(out.findings) - MAX_FINDINGS
        del out.findings[MAX_FINDINGS:]
        out.findings.append((out.findings[-1][0], f"and {more} more in this file"))
    return out


def _row(row: List[str], classes: int, polygons: bool) -> Tuple[Box, List[float]]:
    """Parse one row of a label file. Return its box, and all numbers of the row.

    Raises:
        ValueError: the row is malformed. The message says how.
    """
    columns = len(row)
    if polygons and columns == 5:
        raise ValueError("a box in a file of polygons; Ultralytics rejects the mix")
    if polygons and (columns < 7 or columns % 2 == 0):
        raise ValueError(f"{columns} columns, a polygon has a class and at least three x y pairs")
    if not polygons and columns != 5:
        raise ValueError(f"{columns} columns instead of 5")
    values = [_number(token) for token in row]
    label, numbers = values[0], values[1:]
    if label != int(label):
        raise ValueError(f"class {row[0]} is no whole number")
    if not 0 <= label < classes:
        raise ValueError(f"class {row[0]} is outside 0..{classes - 1}")
    for token, value in zip(row[1:], numbers):
        if not -TOLERANCE <= value <= 1 + TOLERANCE:
            raise ValueError(f"{token} is outside 0..1")
    if not polygons and min(numbers[2:]) < 0:
        raise ValueError(f"negative size {row[3]} x {row[4]}")
    x, y, w, h = _extremes(numbers) if polygons else [min(max(value, 0.0), 1.0) for value in numbers]
    if w <= 0 or h <= 0:
        raise ValueError("box without area")
    return (int(label), x, y, w, h), values


def _number(token: str) -> float:
    try:
        value = float(token) if token.isascii() and "_" not in token else math.nan
    except ValueError:
        raise ValueError(f"{token[:40]!r} is no number") from None
    if not math.isfinite(value):
        raise ValueError(f"{token[:40]!r} is no finite number")
    return value


def _extremes(points: List[float]) -> List[float]:
    """Return the box (x centre, y centre, width, height) around the points x1 y1 x2 y2 ..., clipped to the image."""
    clipped = [min(max(value, 0.0), 1.0) for value in points]
    left, right = min(clipped[0::2]), max(clipped[0::2])
    top, bottom = min(clipped[1::2]), max(clipped[1::2])
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
