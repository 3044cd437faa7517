"""The latency of a cascade over all images, from the latencies of some: the images of both kinds are weighted by their shares.

An image that only the small model sees is kept, the others are handed over to the large model as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, TypedDict

import numpy as np

from . import end_to_end
from .interleaved import measure_in_turn
from .latency import percentiles
from .messages import Spec


class Split(NamedTuple):
    """Latencies of a cascade in ms: mean over all images, of those that only the small model sees, and of the others.

    `kept_ms` or `handed_ms` is None if there is no such image.
    """

    mean_ms: float
    kept_ms: Optional[float]
    handed_ms: Optional[float]


class CascadeLatency(TypedDict):
    """Latencies from a decoded image to its detections. `p50_ms` and `p99_ms` are null if too few calls were timed."""

    mean_ms: float
    p50_ms: Optional[float]
    p99_ms: Optional[float]  # about the sum of both models: an image that needs the large model goes through both
    kept_ms: Optional[float]  # mean of the images that only the small model sees
    handed_ms: Optional[float]  # mean of the other images
    small_ms: float  # mean of the small model alone
    large_ms: float  # mean of the large model alone
    latency_n: int  # timed calls of the cascade
    latency_quiet: bool  # whether other programs were idle
    memory_mib: Optional[float]  # peak memory of the process with both engines
    threads: Optional[int]  # threads of one inference on a CPU


def split_latency(rounds_ms: Sequence[Sequence[float]], handed_M: np.ndarray, share: float) -> Split:
    """Return the latency of a cascade over all images.

    Args:
        rounds_ms: latencies of each round. Sample i is of image i modulo M.
        handed_M: whether each of the M timed images goes to the large model.
        share: share of all images that go to the large model. The mean weights both kinds of images by it.

    Raises:
        ValueError: the share needs a kind of image that was not timed.
    """
    samples_ms, handed = _samples(rounds_ms, handed_M)
    kept_ms, handed_ms = (float(samples_ms[kind].mean()) if kind.any() else None for kind in (~handed, handed))
    if (kept_ms is None and share < 1) or (handed_ms is None and share > 0):
        raise ValueError(f"a share of {share} goes to the large model, but only one kind of image was timed")
    return Split((1 - share) * (kept_ms or 0.0) + share * (handed_ms or 0.0), kept_ms, handed_ms)


def weighted_percentile(
    rounds_ms: Sequence[Sequence[float]], handed_M: np.ndarray, share: float, percent: float
) -> float:
    """Return a percentile of the latency over all images: the least latency that `percent` of the images do not exceed.

    The arguments are those of `split_latency`.
    """
    samples_ms, handed = _samples(rounds_ms, handed_M)
    weights = np.where(handed, share / max(handed.sum(), 1), (1 - share) / max((~handed).sum(), 1))
    order = np.argsort(samples_ms, kind="stable")
    reached = np.cumsum(weights[order])
    first = int(np.searchsorted(reached, percent / 100 * reached[-1] * (1 - 1e-12)))
    return float(samples_ms[order[first]])


def _samples(rounds_ms: Sequence[Sequence[float]], handed_M: np.ndarray) -> "tuple[np.ndarray, np.ndarray]":
    """Return the samples of all rounds, and for each whether its image goes to the large model."""
    handed = np.concatenate([np.resize(handed_M, len(samples)) for samples in rounds_ms])
    return np.concatenate([np.asarray(samples, np.float64) for samples in rounds_ms]), handed


def cascade_latency(
    folder: Path,
    parts: Sequence[Path],
    images: Sequence[Path],
    handed_M: np.ndarray,
    share: float,
    rounds: int,
    least: int,
    threads: Optional[int],
) -> CascadeLatency:
    """Measure a cascade and each of its models alone, in turn, each in a process of its own.

    Args:
        folder: policy folder of the cascade.
        parts: folders of the small and the large engine.
        images: image files, decoded before the first round.
        handed_M: whether each image goes to the large model.
        share: share of the images on the robot that go to the large model.
        rounds: number of rounds; an even number cancels drift.
        least: least number of samples in all rounds.
        threads: threads of one inference on a CPU. None: one per usable processor.

    Raises:
        LatencyError: a measuring process failed.
    """
    specs: List[Spec] = [
        {
            "label": one.name,
            "engine": str(one),
            "module": end_to_end.MODULE,
            "images": [str(image) for image in images],
            "threads": threads,
        }
        for one in (*parts, folder)
    ]
    per_round = -(-least // (rounds * len(images))) * len(images)  # every image equally often
    small, large, both = measure_in_turn(specs, rounds, per_round)
    small_ms, large_ms = (split_latency(one["rounds_ms"], handed_M, share).mean_ms for one in (small, large))
    own = split_latency(both["rounds_ms"], handed_M, share)
    enough = percentiles(both["samples_ms"])

    def at(percent: int, plain: Optional[float]) -> Optional[float]:
        return None if plain is None else weighted_percentile(both["rounds_ms"], handed_M, share, percent)

    return {
        "mean_ms": own.mean_ms,
        "p50_ms": at(50, enough["latency_p50_ms"]),
        "p99_ms": at(99, enough["latency_p99_ms"]),
        "kept_ms": own.kept_ms,
        "handed_ms": own.handed_ms,
        "small_ms": small_ms,
        "large_ms": large_ms,
        "latency_n": enough["latency_n"],
        "latency_quiet": all(one["quiet"] for one in (small, large, both)),
        "memory_mib": both["memory_mib"],
        "threads": both["threads"],
    }
