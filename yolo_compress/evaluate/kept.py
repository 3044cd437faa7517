"""Detections of a whole image set as one array on disk, so that figures can be taken of them later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from yolo_compress.evaluate.coco import MAX_DETECTIONS


def save(file: Path, detections: Sequence[np.ndarray]) -> None:
    """Write the best 100 of each image: image index, x1, y1, x2, y2 in px of the image, score, class; float32."""
    parts = [np.zeros((0, 7))]
    for image, found_N6 in enumerate(detections):
        best_N6 = found_N6[np.argsort(-found_N6[:, 4], kind="stable")[:MAX_DETECTIONS]]
        parts.append(np.column_stack([np.full(len(best_N6), image), best_N6]))
    np.save(file, np.concatenate(parts).astype(np.float32))


def load(file: Path, images: int) -> list[np.ndarray]:
    """One N6 array an image: xyxy, score, class."""
    table_N7 = np.load(file)
    return np.split(table_N7[:, 1:], np.searchsorted(table_N7[:, 0], np.arange(1, images)))
