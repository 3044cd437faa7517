"""Ratio of the latencies of two models, with an interval, from samples that were measured in turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from yolo_compress.evaluate.ab.schema import LatencyRatio
from yolo_compress.evaluate.bootstrap import interval

Rounds = Sequence[Sequence[float]]  # latencies in ms, one list per round


def latency_ratio(rounds_a: Rounds, rounds_b: Rounds, replicates: int, seed: int) -> LatencyRatio:
    """Return the ratio of the median latencies of models A and B, with a bootstrap interval.

    Each replicate resamples the rounds, then the samples in each round. The same rounds are drawn for both models, because both
    models share the state of the machine in a round.

    Raises:
        ValueError: the numbers of rounds differ, or a round has no samples.
    """
    if len(rounds_a) != len(rounds_b) or not all([*rounds_a, *rounds_b]) or not rounds_a:
        raise ValueError(
            f"{len(rounds_a)} and {len(rounds_b)} rounds, expected equal numbers of rounds with samples in each"
        )
    generator = np.random.default_rng(seed)
    medians = np.empty((replicates, 2))
    both = [[np.asarray(samples, np.float64) for samples in rounds] for rounds in (rounds_a, rounds_b)]
    for medians_2 in medians:
        drawn = generator.integers(0, len(rounds_a), len(rounds_a))
        for model, rounds in enumerate(both):
            medians_2[model] = np.median(np.concatenate([generator.choice(rounds[r], len(rounds[r])) for r in drawn]))
    low, high = interval(medians[:, 0] / medians[:, 1])
    a, b = (float(np.median(np.concatenate(rounds))) for rounds in both)
    return {"a_p50_ms": a, "b_p50_ms": b, "ratio": a / b, "low": low, "high": high}
