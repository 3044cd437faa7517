"""Choose the validation images that a cascade is timed on."""

from __future__ import annotations

import numpy as np


def timed_images(handed_I: np.ndarray, most: int) -> list[int]:
    """Return the indices of the images to time, sorted: both kinds in their shares, at least one of each, evenly spaced.

    Args:
        handed_I: whether an image goes to the large model.
        most: largest number of images; at least 2.
    """
    images = len(handed_I)
    if images <= most:
        return list(range(images))
    handed, kept = np.flatnonzero(handed_I), np.flatnonzero(~handed_I)
    count = round(most * len(handed) / images)
    if len(handed) and len(kept):
        count = min(max(count, 1), most - 1)
    return sorted([*_evenly(handed, count), *_evenly(kept, most - count)])


def _evenly(indices: np.ndarray, count: int) -> list[int]:
    return [int(indices[i * len(indices) // count]) for i in range(count)]
