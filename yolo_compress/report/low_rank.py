"""Whether low rank is recommended: it is compared with channel pruning for the same budget."""

from __future__ import annotations

import math

from yolo_compress.report import numbers as n
from yolo_compress.report.schema import LowRankFigures


def is_recommended(found: LowRankFigures) -> bool:
    """Return whether low rank has the smaller loss within the same measured time. Without a measured time it is never recommended."""
    smaller = found["channel_loss"] is None or found["loss"] < found["channel_loss"]
    return smaller and math.isfinite(found["loss"]) and found["runtime"] is not None


def low_rank_note(found: LowRankFigures) -> str:
    """Return sentences that say how many convolutions are factorised, and whether that is recommended."""
    count = f"Low rank: {len(found['factors'])} of {found['convolutions']} convolutions are factorised."
    channel, loss = found["channel_loss"], f"{found['loss']:.3f}"
    if channel is None:
        compared = "Channel pruning alone cannot meet this budget"
    elif found["loss"] < channel:
        compared = f"Before fine-tuning, its loss is {loss}, that of channel pruning for the same budget {channel:.3f}"
    else:
        return (
            f"{count} It is not recommended here: before fine-tuning, its loss is {loss}, that of channel pruning for the same "
            f"budget {channel:.3f}. Set prune.kind=channel and prune.then=off."
        )
    if found["runtime"] is None:
        return (
            f"{count} {compared}. It is not recommended yet: its time was not measured, and more layers can take longer for the "
            "same FLOPs. Set prune.latency_ms."
        )
    return (
        f"{count} {compared}. It is recommended for {n.runtime(found['runtime'])}, by the measured times of its layers."
    )
