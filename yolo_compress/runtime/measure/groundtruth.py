"""Read validation images and boxes on the robot: a YOLO folder (`images/`, `labels/`), or a COCO json and a folder of images.

labels.py parses the label files. The preflight also uses labels.py, so the boxes are exactly equal.
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
    """Return the images below `folder/images` with their boxes. An image without a label file is background: it has no boxes.

    Raises:
        SourceError: there is no image, no label file, or a label file has an error. The message has the file and the line.
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
            raise SourceError(f"{file}:{number}: {what}; correct it, since mAP over other boxes is not comparable")
        found.append(Labelled(image, tuple(labels.boxes)))
    if not labelled:
        raise SourceError(f"{label_path(images[0]).parent}: no label file for any of the {len(images)} images")
    return found


def coco_file(file: Path, images: Path, names: Sequence[str]) -> List[Labelled]:
    """Return the images and boxes that a COCO json lists.

    Args:
        file: the COCO json.
        images: folder that the `file_name` of an image is relative to.
        names: class names of the model. Categories are mapped to classes by name.

    Raises:
        SourceError: the file cannot be read, or has boxes of a category that the model does not have. Or a box is marked as a
            crowd, which the matching does not support.
    """
    try:
        document = json_text.read(file)
        labels = {one["id"]: names.index(one["name"]) for one in document["categories"] if one["name"] in names}
        unknown = sorted({one["name"] for one in document["categories"]} - set(names))
        sizes = {one["id"]: (one["file_name"], one["width"], one["height"]) for one in document["images"]}
        boxes: Dict[Any, List[Box]] = {key: [] for key in sizes}
        for one in document["annotations"]:
            if one.get("iscrowd"):
                raise SourceError(f"{file}: annotation {one['id']} is a crowd; leave such images out")
            if one["category_id"] not in labels:
                raise SourceError(
                    f"{file}: boxes of {', '.join(unknown[:5])}, the model has {', '.join(names[:5])} ..."
                )
            x, y, w, h = (float(side) for side in one["bbox"])
            _, width, height = sizes[one["image_id"]]
            label = labels[one["category_id"]]
            boxes[one["image_id"]].append((label, (x + w / 2) / width, (y + h / 2) / height, w / width, h / height))
        return [Labelled(images / sizes[key][0], tuple(boxes[key])) for key in sizes]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise SourceError(f"{file}: not a COCO json for detection ({error!r})") from error


def absolute(boxes: Sequence[Box], height: int, width: int) -> np.ndarray:
    """Return the boxes as an (N, 5) array, columns class, x1, y1, x2, y2 in px of the image.

    The arithmetic is that of `evaluate.coco.absolute_boxes`.
    """
    boxes_N5 = np.array(boxes, np.float64).reshape(-1, 5)
    size_4 = np.array([width, height, width, height], np.float64)
    half_N2 = boxes_N5[:, 3:5] / 2
    corners_N4 = np.concatenate([boxes_N5[:, 1:3] - half_N2, boxes_N5[:, 1:3] + half_N2], axis=1)
    return np.concatenate([boxes_N5[:, :1], corners_N4 * size_4], axis=1)


def image_set(rows: Sequence[Tuple[str, Sequence[Box]]], names: Sequence[str]) -> str:
    """Return a digest of a set of images and their boxes. The digest does not depend on file names and folders.

    Args:
        rows: (SHA-256 of the image file, boxes) of each image.
        names: class names in the order of their index.
    """
    ranked = sorted([digest, sorted(list(box) for box in boxes)] for digest, boxes in rows)
    return hashlib.sha256(json.dumps([list(names), ranked], separators=(",", ":")).encode()).hexdigest()


def _files(root: Path) -> Iterator[Path]:
    """Yield the plain files below a folder. A folder that does not exist has none."""
    for path in sorted(root.rglob("*")):
        if path.is_file():
            yield path
