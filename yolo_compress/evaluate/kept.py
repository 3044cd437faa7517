"""Detections of a whole image set as one array on disk, so that figures can be taken of them later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from yolo_compress.evaluate.coco import MAX_DETECTIONS


def save(file: Path, detections: Sequence[np.ndarray]) -> None:
    """Write what mAP counts, the best 100 of a class in each image: image index, xyxy in px of the image, score, class; float32."""
    parts = [np.zeros((0, 7))]
    for image, found_N6 in enumerate(detections):
        best_N6 = found_N6[np.argsort(-found_N6[:, 4], kind="stable")]
        count = [np.flatnonzero(best_N6[:, 5] == label)[:MAX_DETECTIONS] for label in np.unique(best_N6[:, 5])]
        rows_N6 = best_N6[np.sort(np.concatenate([np.zeros(0, int), *count]))]
        parts.append(np.column_stack([np.full(len(rows_N6), image), rows_N6]))
    np.save(file, np.concatenate(parts).astype(np.float32))


def load(file: Path, images: int) -> list[np.ndarray]:
    """One N6 array an image: xyxy, score, class."""
    table_N7 = np.load(file)
    return np.split(table_N7[:, 1:], np.searchsorted(table_N7[:, 0], np.arange(1, images)))
