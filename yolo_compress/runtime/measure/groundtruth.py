"""Images and boxes of a validation folder on the robot: the YOLO layout (`images/`, `labels/`) or one COCO json beside a folder.

Labels are read by the rules of labels.py, which the workstation's preflight uses too; so the boxes are the same numbers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np

from .. import json_text
from ..detect.sources import IMAGE_SUFFIXES
from ..errors import SourceError
from .labels import Box, label_path, parse


class Labelled(NamedTuple):
    """An image and its boxes: class, centre x, centre y, width, height, as fractions of the image."""

    image: Path
    boxes: Tuple[Box, ...]


def yolo_folder(folder: Path, classes: int) -> List[Labelled]:
    """Every image below `folder/images` with its labels; an image without a label file is background.

    Raises:
        SourceError: no such folder, no image, no label file at all, or a label file with a fault (file and line).
    """
    root = (folder / "images").resolve()
    images = sorted(path for path in _files(root) if path.suffix[1:].lower() in IMAGE_SUFFIXES)
    if not images:
        raise SourceError(f"{root}: holds no image; --data takes a folder with images/ and labels/")
    found, labelled = [], 0
    for image in images:
        file = label_path(image)
        if not file.is_file():
            found.append(Labelled(image, ()))
            continue
        labelled += 1
        labels = parse(file.read_bytes(), classes)
        if labels.findings:
            number, what = labels.findings[0]
            raise SourceError(f"{file}:{number}: {what}; mend it, a mAP over other boxes would not compare")
        found.append(Labelled(image, tuple(labels.boxes)))
    if not labelled:
        raise SourceError(f"{label_path(images[0]).parent}: no label file of any of the {len(images)} images")
    return found


def coco_file(file: Path, images: Path, names: Sequence[str]) -> List[Labelled]:
    """The images of a COCO json, by `file_name` below `images`; categories are found by name.

    Raises:
        SourceError: no such file, boxes of a category that the net does not have, or a crowd, which the matcher does not know.
    """
    try:
        document = json_text.read(file)
        labels = {one["id"]: names.index(one["name"]) for one in document["categories"] if one["name"] in names}
        strangers = sorted({one["name"] for one in document["categories"]} - set(names))
        sizes = {one["id"]: (one["file_name"], one["width"], one["height"]) for one in document["images"]}
        boxes: Dict[Any, List[Box]] = {key: [] for key in sizes}
        for one in document["annotations"]:
            if one.get("iscrowd"):
                raise SourceError(f"{file}: annotation {one['id']} is a crowd; leave such images out")
            if one["category_id"] not in labels:
                raise SourceError(
                    f"{file}: boxes of {', '.join(strangers[:5])}, the net has {', '.join(names[:5])} ..."
                )
            x, y, w, h = (float(side) for side in one["bbox"])
            _, width, height = sizes[one["image_id"]]
            label = labels[one["category_id"]]
            boxes[one["image_id"]].append((label, (x + w / 2) / width, (y + h / 2) / height, w / width, h / height))
        return [Labelled(images / sizes[key][0], tuple(boxes[key])) for key in sizes]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise SourceError(f"{file}: no COCO json of detections ({error!r})") from error


def absolute(boxes: Sequence[Box], height: int, width: int) -> np.ndarray:
    """boxes_N5 (class, x1, y1, x2, y2) in px of the image; the workstation's arithmetic (`evaluate.coco.absolute_boxes`)."""
    boxes_N5 = np.array(boxes, np.float64).reshape(-1, 5)
    size_4 = np.array([width, height, width, height], np.float64)
    half_N2 = boxes_N5[:, 3:5] / 2
    corners_N4 = np.concatenate([boxes_N5[:, 1:3] - half_N2, boxes_N5[:, 1:3] + half_N2], axis=1)
    return np.concatenate([boxes_N5[:, :1], corners_N4 * size_4], axis=1)


def image_set(rows: Sequence[Tuple[str, Sequence[Box]]], names: Sequence[str]) -> str:
    """Digest of the images' sha256 and boxes, wherever they lie and whatever they are called.

    Args:
        rows: (sha256 of the image file, boxes) of each image.
    """
    ranked = sorted([digest, sorted(list(box) for box in boxes)] for digest, boxes in rows)
    return hashlib.sha256(json.dumps([list(names), ranked], separators=(",", ":")).encode()).hexdigest()


def _files(root: Path) -> Iterator[Path]:
    """Plain files below a folder; none where there is no such folder."""
    for path in sorted(root.rglob("*")):
        if path.is_file():
            yield path
