"""Detections of a bench row on disk: a float32 .npy with a row per detection: image index, x1, y1, x2, y2 in px, score, class.

The file has all detections that mAP counts, with scores above 0.001.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from yolo_compress.errors import CorruptArtifact
from yolo_compress.files.atomic import storage_errors
from yolo_compress.runtime.max_detections import MAX_DETECTIONS
from yolo_compress.runtime.measure.coco_map import counting


def row_name(row: Mapping[str, object]) -> str:
    """Return `<model>-<runtime>-<precision>` of a bench row. A file with the detections of the row has this name, and a suffix."""
    return f"{row['model']}-{row['runtime']}-{row['precision']}"


def keep(file: Path, detections: Sequence[np.ndarray], most: int = MAX_DETECTIONS) -> None:
    """Write detections to `file`: one N6 array per image, limited to the best `most` of each class.

    Raises:
        StorageError: the file cannot be written.
    """
    tables = [
        np.column_stack([np.full(len(kept), image), kept])
        for image, rows in enumerate(detections)
        if len(kept := rows[counting(rows, most)])
    ]
    with storage_errors(file):
        np.save(file, np.concatenate([np.zeros((0, 7)), *tables]).astype(np.float32))


def kept(file: Path, images: int) -> list[np.ndarray]:
    """Read the detections that `keep` wrote, and return one N6 array per image.

    Args:
        file: file that `keep` wrote.
        images: number of all images, with and without detections.

    Raises:
        CorruptArtifact: the table is malformed, or has an image index of `images` or more.
    """
    table_N7 = np.load(file, allow_pickle=False)
    if table_N7.ndim != 2 or table_N7.shape[1] != 7 or not ((table_N7[:, 0] >= 0) & (table_N7[:, 0] < images)).all():
        raise CorruptArtifact(f"{file}: no detections of {images} images; run bench again with force=true")
    starts = np.searchsorted(table_N7[:, 0], np.arange(images + 1))
    return [table_N7[starts[i] : starts[i + 1], 1:] for i in range(images)]
