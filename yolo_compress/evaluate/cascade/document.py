"""Make the cascade document from all measurements: the figures of the models and of the cascade, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from yolo_compress.data.dataset import Dataset
from yolo_compress.evaluate.bootstrap import resamples
from yolo_compress.evaluate.cascade.choose import Choice
from yolo_compress.evaluate.cascade.collect import Collected
from yolo_compress.evaluate.cascade.gain import Mixes
from yolo_compress.evaluate.cascade.judge import Measured, demanded, judge
from yolo_compress.evaluate.cascade.router import Fit
from yolo_compress.evaluate.cascade.schema import SCHEMA, Cascade, CascadeDocument, Demand, Model
from yolo_compress.runtime.backends.base import EngineInfo
from yolo_compress.runtime.detect.cascade import FEATURES
from yolo_compress.runtime.measure.cascade_latency import Split, split_latency
from yolo_compress.runtime.measure.latency import percentiles
from yolo_compress.runtime.measure.messages import Measured as Timed


class Entrant(NamedTuple):
    """An engine on the command line."""

    name: str  # "small", "large" or "static"
    label: str
    folder: Path
    info: EngineInfo


def judged(
    entrants: Sequence[Entrant],
    data: Dataset,
    router: Fit,
    choice: Choice | None,
    gain_I: np.ndarray,
    held_out: Collected,
    handed_I: np.ndarray,
    timed: Sequence[int],
    measured: Sequence[Timed],
    demand: Demand,
    replicates: int = 1000,
    seed: int = 0,
) -> CascadeDocument:
    """Return the cascade document from all measurements.

    Args:
        gain_I: gain of each training image.
        held_out: detections in the validation images.
        handed_I: whether a validation image goes to the large model.
        timed: indices of the validation images that were timed.
        measured: latencies of the entrants, and then of the cascade if there is one.
        demand: what the cascade has to meet.
        replicates, seed: number and seed of the bootstrap samples of the validation images.
    """
    classes, weights_BI = len(data.names), resamples(len(data.val), replicates, seed)
    none_1I = np.zeros((1, len(data.val)), bool)

    def figures(mixes: Mixes, large_1I: np.ndarray, mean_ms: float) -> Measured:
        drawn_B = mixes.map50_95(np.repeat(large_1I, len(weights_BI), axis=0), weights_BI)
        return Measured(float(mixes.map50_95(large_1I)[0]), drawn_B, mean_ms)

    mean_ms = [float(np.mean(one["samples_ms"])) for one in measured]
    mixes = Mixes.of(held_out.truths, held_out.found[0], held_out.found[1], classes)
    models = {"small": figures(mixes, none_1I, mean_ms[0]), "large": figures(mixes, ~none_1I, mean_ms[1])}
    if len(entrants) > 2:
        alone = Mixes.of(held_out.truths, held_out.found[2], held_out.found[2], classes)
        models["static"] = figures(alone, none_1I, mean_ms[2])
    own, split, reason = None, None, ""
    if choice is not None:
        split = split_latency(measured[-1]["rounds_ms"], handed_I[list(timed)], float(handed_I.mean()))
        own = figures(mixes, handed_I[None], split.mean_ms)
    elif router.penalty is None:
        reason = "the small model's detections do not tell which images gain from the large model"
    else:
        reason = f"no share of the training images meets {demanded(demand)}"
        if demand["latency_ms"] is None and demand["max_drop"] is None:
            reason = "no training image is expected to gain from the large model"
    verdict, control = judge(models, own, demand, reason)
    described = [_model(entrant, models[entrant.name], one) for entrant, one in zip(entrants, measured, strict=False)]
    return {
        "schema": SCHEMA,
        "small": described[0],
        "large": described[1],
        "static": described[2] if len(described) > 2 else None,
        "names": list(data.names),
        "image_set": data.val_digest,
        "images": len(data.val),
        "demand": demand,
        "router": {
            "features": list(FEATURES),
            "weights": [float(weight) for weight in router.weights_F],
            "bias": router.bias,
            "penalty": router.penalty,
            "explained": router.explained,
            "images": len(gain_I),
            "gain": float(gain_I.sum()),
        },
        "cascade": _cascade(choice, own, split, handed_I, timed, measured[-1]),
        "control": control,
        "verdict": verdict,
        "quiet": all(one["quiet"] for one in measured),
    }


def _model(entrant: Entrant, figures: Measured, measured: Timed) -> Model:
    at = percentiles(measured["samples_ms"])
    return {
        "label": entrant.label,
        "executed": measured["executed"],
        "imgsz": list(entrant.info.imgsz),
        "onnx_sha256": entrant.info.onnx_sha256,
        "precision": entrant.info.precision,
        "map50_95": figures.map50_95,
        "mean_ms": figures.mean_ms,
        "p50_ms": at["latency_p50_ms"],
        "p99_ms": at["latency_p99_ms"],
    }


def _cascade(
    choice: Choice | None,
    own: Measured | None,
    split: Split | None,
    handed_I: np.ndarray,
    timed: Sequence[int],
    measured: Timed,
) -> Cascade | None:
    if choice is None or own is None or split is None:
        return None
    at = percentiles(measured["samples_ms"])
    return {
        "threshold": choice.threshold,
        "kept": float(1 - handed_I.mean()),
        "map50_95": own.map50_95,
        "mean_ms": split.mean_ms,
        "p50_ms": at["latency_p50_ms"],
        "p99_ms": at["latency_p99_ms"],
        "kept_ms": split.kept_ms,
        "handed_ms": split.handed_ms,
        "timed_images": len(timed),
        "expected_kept": 1 - choice.share,
    }
