"""Difference between the outputs of two backends on the same inputs, before NMS."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from yolo_compress.errors import NumericsError
from yolo_compress.runtime.backends.base import Backend


def max_abs_difference(first: Backend, second: Backend, images: Iterable[np.ndarray]) -> dict[str, float]:
    """Return the largest difference between the outputs of two backends, over all anchors of all images.

    Args:
        first, second: backends with equal classes and `imgsz`. If a backend has a fixed batch above 1, each image is repeated to
            fill the batch.
        images: letterboxed chw_3HW float32 arrays.

    Returns:
        A dict with three keys. `scores`: largest difference of a class score (0 to 1). `boxes_px`: largest difference of a centre,
        width or height, in letterboxed px. `images`: number of images.

    Raises:
        NumericsError: an output holds NaN or infinity.
        ValueError: there are no images, or the outputs have different shapes.
    """
    scores = boxes = 0.0
    count = 0
    for chw_3HW in images:
        outputs = [
            backend(np.repeat(chw_3HW[None], backend.batch or 1, axis=0)).astype(np.float64)[0]
            for backend in (first, second)
        ]
        if outputs[0].shape != outputs[1].shape:
            raise ValueError(f"outputs {outputs[0].shape} and {outputs[1].shape} cannot be compared")
        if not all(np.isfinite(output).all() for output in outputs):
            raise NumericsError(
                f"image {count}: NaN or infinity in the output of {first.executed} or {second.executed}"
            )
        difference_CA = np.abs(outputs[0] - outputs[1])
        boxes, scores = max(boxes, float(difference_CA[:4].max())), max(scores, float(difference_CA[4:].max()))
        count += 1
    if not count:
        raise ValueError("no images to compare on")
    return {"scores": scores, "boxes_px": boxes, "images": float(count)}
