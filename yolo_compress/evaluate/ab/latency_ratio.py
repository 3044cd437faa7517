"""How much faster one model is than another, with an interval, from samples of both taken in turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from yolo_compress.evaluate.ab.schema import LatencyRatio
from yolo_compress.evaluate.bootstrap import interval

Rounds = Sequence[Sequence[float]]  # samples of one inference in ms, a list a round


def latency_ratio(rounds_a: Rounds, rounds_b: Rounds, replicates: int, seed: int) -> LatencyRatio:
    """Bootstrap of the ratio of medians, in two steps: rounds (the same of both, as they share the machine's mood), then samples.

    Raises:
        ValueError: not as many rounds of one as of the other, or a round without samples.
    """
    if len(rounds_a) != len(rounds_b) or not all([*rounds_a, *rounds_b]) or not rounds_a:
        raise ValueError(f"{len(rounds_a)} and {len(rounds_b)} rounds, as many of both with samples in each expected")
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
