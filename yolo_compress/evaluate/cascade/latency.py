"""The mean latency of a cascade over all images, from the latencies of some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Latencies of a cascade in ms: mean over all images, of those that only the small model sees, and of the others.

    `kept_ms` or `handed_ms` is None if there is no such image.
    """

    mean_ms: float
    kept_ms: float | None
    handed_ms: float | None


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


def split_latency(rounds_ms: Sequence[Sequence[float]], handed_M: np.ndarray, share: float) -> Split:
    """Return the latency of a cascade over all images.

    Args:
        rounds_ms: latencies of each round. Sample i is of image i modulo M.
        handed_M: whether each of the M timed images goes to the large model.
        share: share of all images that go to the large model. The mean weights both kinds of images by it.

    Raises:
        ValueError: the share needs a kind of image that was not timed.
    """
    handed = np.concatenate([np.resize(handed_M, len(samples)) for samples in rounds_ms])
    samples_ms = np.concatenate([np.asarray(samples, np.float64) for samples in rounds_ms])
    kept_ms, handed_ms = (float(samples_ms[kind].mean()) if kind.any() else None for kind in (~handed, handed))
    if (kept_ms is None and share < 1) or (handed_ms is None and share > 0):
        raise ValueError(f"a share of {share} goes to the large model, but only one kind of image was timed")
    return Split((1 - share) * (kept_ms or 0.0) + share * (handed_ms or 0.0), kept_ms, handed_ms)
