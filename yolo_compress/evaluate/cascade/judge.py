"""Judge a cascade: is it better than what a static choice of models gives at the same mean latency?

The control is the best static choice. Two models with a share of the images each, chosen without looking at them, need no router, and
give every latency between the two. So the line between two models is the least that a cascade has to beat. All figures are on
images that the router was not fitted to. Shape suffix: B bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from yolo_compress.evaluate.bootstrap import interval
from yolo_compress.evaluate.cascade.schema import Control, Demand, Verdict

LATENCY_MARGIN = 0.05  # of latency_ms; as for the latency targets of pruning, latencies of one engine differ that much


@dataclass(frozen=True)
class Measured:
    """A model, or the cascade, on the validation images: mAP50-95, its bootstrap replicates, and the mean latency in ms."""

    map50_95: float
    map50_95_B: np.ndarray
    mean_ms: float


def control(models: Mapping[str, Measured], mean_ms: float) -> tuple[Control, np.ndarray]:
    """Return the static choice with the highest mAP50-95 that takes at most `mean_ms`, and the replicates of its mAP.

    Args:
        models: measured models by name. The fastest must take at most `mean_ms`.
    """
    label, value, replicates_B = max(_choices(models, mean_ms), key=lambda choice: choice[1])
    return {"label": label, "map50_95": value}, replicates_B


def _choices(models: Mapping[str, Measured], mean_ms: float) -> Iterator[tuple[str, float, np.ndarray]]:
    for name, one in models.items():
        if one.mean_ms <= mean_ms:
            yield f"{name} alone", one.map50_95, one.map50_95_B
        for other, two in models.items():
            if one.mean_ms < mean_ms < two.mean_ms:
                share = (mean_ms - one.mean_ms) / (two.mean_ms - one.mean_ms)
                yield (
                    f"{name} with {other} for any {share:.0%} of the images",
                    (1 - share) * one.map50_95 + share * two.map50_95,
                    (1 - share) * one.map50_95_B + share * two.map50_95_B,
                )


def meets(demand: Demand, one: Measured, large: Measured) -> bool | None:
    """Return whether a model or a cascade meets the demand on these images. None: nothing is demanded."""
    if demand["latency_ms"] is not None:
        return one.mean_ms <= demand["latency_ms"] * (1 + LATENCY_MARGIN)
    if demand["max_drop"] is not None:
        return one.map50_95 >= (1 - demand["max_drop"]) * large.map50_95
    return None


def judge(
    models: Mapping[str, Measured], cascade: Measured | None, demand: Demand, reason: str = ""
) -> tuple[Verdict, Control | None]:
    """Return the verdict and the control.

    The verdict is "pass" if the cascade meets the demand and the whole 95 % interval of its difference from the control is above 0.
    It is "fail" if it misses the demand, or if the difference is not above 0. Otherwise it is "inconclusive". Unless it is "pass", the
    cascade is not recommended, and the verdict names the model to use instead.

    Args:
        models: "small", "large" and perhaps "static".
        cascade: None: no cascade could be made.
        reason: why no cascade could be made.
    """
    large = models["large"]
    instead = _instead(models, cascade, demand)
    use = f"use {instead} alone: {_figures(models[instead])}"
    if cascade is None:
        return _verdict("fail", f"FAIL: {use}; {reason}", instead), None
    best, best_B = control(models, cascade.mean_ms)
    delta = cascade.map50_95 - best["map50_95"]
    low, high = interval(cascade.map50_95_B - best_B)
    met = meets(demand, cascade, large)
    span = "" if low is None or high is None else f" (95 % interval {low:+.4f} to {high:+.4f})"
    beside = f"{best['label']} has mAP50-95 {best['map50_95']:.3f} at that mean latency, {delta:+.4f}{span}"
    status: Literal["pass", "fail", "inconclusive"]
    if met is False:
        status = "fail"
        line = f"FAIL: {use}; the cascade misses {demanded(demand)} on the validation images: {_figures(cascade)}"
    elif delta <= 0:
        status = "fail"
        line = f"FAIL: {use}; a static choice is as good as the cascade ({_figures(cascade)}): {beside}"
    elif low is None or low <= 0:
        status = "inconclusive"
        line = (
            f"INCONCLUSIVE: {use}; these images cannot show that the cascade ({_figures(cascade)}) is better: {beside}"
        )
    else:
        status, line = "pass", f"PASS: use the cascade: {_figures(cascade)}; {beside}"
    return _verdict(status, line, instead, delta, low, high, met), best


def _instead(models: Mapping[str, Measured], cascade: Measured | None, demand: Demand) -> str:
    """Return the best model alone: of those that meet the demand, or without a demand, of those that are not slower than the cascade.

    For `max_drop` it is the fastest, otherwise the one with the highest mAP. If no model fits, it is the one that comes nearest.
    """
    if demand["max_drop"] is not None:
        fitting = [name for name, one in models.items() if meets(demand, one, models["large"])]
        return min(fitting, key=lambda name: models[name].mean_ms)  # the large model always fits
    limit = None if cascade is None else cascade.mean_ms
    if demand["latency_ms"] is not None:
        limit = demand["latency_ms"] * (1 + LATENCY_MARGIN)
    fitting = [name for name, one in models.items() if limit is None or one.mean_ms <= limit] or ["small"]
    return max(fitting, key=lambda name: (models[name].map50_95, -models[name].mean_ms))


def _figures(one: Measured) -> str:
    return f"mAP50-95 {one.map50_95:.3f} at {one.mean_ms:.2f} ms"


def demanded(demand: Demand) -> str:
    """Return the demand as it is given on the command line."""
    if demand["latency_ms"] is not None:
        return f"latency_ms={demand['latency_ms']:g}"
    return f"max_drop={demand['max_drop']:g}"


def _verdict(
    status: Literal["pass", "fail", "inconclusive"],
    line: str,
    instead: str,
    delta: float | None = None,
    low: float | None = None,
    high: float | None = None,
    met: bool | None = None,
) -> Verdict:
    return {"status": status, "line": line, "instead": instead, "delta": delta, "low": low, "high": high, "met": met}
