"""Detections of a bench row on disk: one float32 .npy, a line a detection: image index, x1, y1, x2, y2 in px, score, class.

All that mAP counts is kept, from the score 0.001 on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from yolo_compress.errors import CorruptArtifact
from yolo_compress.files.atomic import storage_errors
from yolo_compress.runtime.limits import MAX_DETECTIONS
from yolo_compress.runtime.measure.coco_map import counting


def row_name(row: Mapping[str, object]) -> str:
    """File name of a row of a bench, by its model, runtime and precision."""
    return f"{row['model']}-{row['runtime']}-{row['precision']}"


def keep(file: Path, detections: Sequence[np.ndarray], most: int = MAX_DETECTIONS) -> None:
    """Writes one N6 array an image, the best `most` of each class.

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
    """One N6 array an image, as `keep` was given them.

    Raises:
        CorruptArtifact: another table, or of more images.
    """
    table_N7 = np.load(file, allow_pickle=False)
    if table_N7.ndim != 2 or table_N7.shape[1] != 7 or not ((table_N7[:, 0] >= 0) & (table_N7[:, 0] < images)).all():
        raise CorruptArtifact(f"{file}: no detections of {images} images; run bench again with force=true")
    starts = np.searchsorted(table_N7[:, 0], np.arange(images + 1))
    return [table_N7[starts[i] : starts[i + 1], 1:] for i in range(images)]
