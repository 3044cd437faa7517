"""Choose the threshold of a router: which share of the images goes to the large model.

The images are those of the fit. Each is ranked by a router that was fitted without it, so the mAP at a share is not too good.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from yolo_compress.evaluate.bootstrap import resamples
from yolo_compress.evaluate.cascade.gain import Mixes
from yolo_compress.evaluate.cascade.router import Fit
from yolo_compress.evaluate.cascade.schema import Demand

STEPS = 100  # shares that are tried
SAFE_STEPS, REPLICATES = 40, 100  # for max_drop: each share is tried on that many bootstrap samples of the images
RISK = 0.05  # share of the samples in which max_drop may be missed; other images differ from those of the fit


class Choice(NamedTuple):
    """A threshold, and what is expected from it.

    Attributes:
        share: share of the images that go to the large model.
        map50_95: mAP50-95 on the images of the fit, cross-validated.
    """

    threshold: float
    share: float
    map50_95: float


def choose(
    fit: Fit, features_IF: np.ndarray, mixes: Mixes, small_ms: float, large_ms: float, demand: Demand, seed: int = 0
) -> Choice | None:
    """Choose the threshold for a demand.

    An image whose predicted gain is not above 0 never goes to the large model.
    With `latency_ms`, the share is that of the highest mAP among those that the mean latency allows. With `max_drop`, as few images go
    as the mAP allows: at this share, and at every larger one that is possible, the mAP of the mix keeps the demand in all but `RISK`
    of the bootstrap samples. With neither, the share is chosen at which the mix is furthest above the line between the two models.

    Args:
        small_ms, large_ms: mean latencies of both models. An image that goes to the large model takes the sum.
        seed: seed of the bootstrap samples.

    Returns:
        The choice. None: the router cannot tell images apart, or no share meets the demand.
    """
    images = len(features_IF)
    if fit.penalty is None:
        return None
    scores_I = fit.predict(features_IF)
    useful = int((scores_I > 0).sum())
    steps = STEPS if demand["max_drop"] is None else SAFE_STEPS
    counts = np.linspace(1, images - 1, min(steps, images - 1)).round().astype(int)
    counts = np.unique(np.append(counts[counts <= useful], useful))
    counts = counts[(counts > 0) & (counts < images)]
    if not len(counts):
        return None
    rank_I = np.empty(images, int)
    rank_I[np.argsort(-fit.held_out_I, kind="stable")] = np.arange(images)
    handed_RI = rank_I[None] < counts[:, None]
    map_R = mixes.map50_95(handed_RI)
    mean_R = small_ms + counts / images * large_ms
    if demand["latency_ms"] is not None:
        allowed = int((mean_R <= demand["latency_ms"]).sum())
        at = int(map_R[:allowed].argmax()) if allowed else len(counts)
    elif demand["max_drop"] is not None:
        failing = np.flatnonzero(~_keeps(mixes, handed_RI, demand["max_drop"], seed))
        at = int(failing[-1]) + 1 if len(failing) else 0
    else:
        at = int((map_R - _line(mixes, mean_R, small_ms, large_ms)).argmax())
    if at == len(counts):
        return None
    ranked_I = np.sort(scores_I)[::-1]
    count = int(counts[at])
    threshold = max((ranked_I[count - 1] + ranked_I[count]) / 2, 0.0)
    return Choice(float(threshold), count / images, float(map_R[at]))


def _keeps(mixes: Mixes, handed_RI: np.ndarray, max_drop: float, seed: int) -> np.ndarray:
    """Return for each mix whether it keeps `max_drop` in all but `RISK` of the bootstrap samples."""
    weights_BI = resamples(mixes.images, REPLICATES, seed)
    all_BI = np.ones((REPLICATES, mixes.images), bool)
    least_B = (1 - max_drop) * mixes.map50_95(all_BI, weights_BI)
    keeps_R = np.empty(len(handed_RI), bool)
    for number, handed_I in enumerate(handed_RI):
        missed_B = mixes.map50_95(all_BI & handed_I, weights_BI) < least_B
        keeps_R[number] = missed_B.mean() <= RISK
    return keeps_R


def _line(mixes: Mixes, mean_R: np.ndarray, small_ms: float, large_ms: float) -> np.ndarray:
    """Return the mAP of a static choice of both models at each mean latency; from that of the large model on, it is the large one's."""
    none_1I = np.zeros((1, mixes.images), bool)
    small, large = float(mixes.map50_95(none_1I)[0]), float(mixes.map50_95(~none_1I)[0])
    return small + np.minimum((mean_R - small_ms) / (large_ms - small_ms), 1.0) * (large - small)
