"""What a knob is: its words, its limits, the values it may be written as; and the knobs that several sections share."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field

from . import strict_yaml

IMGSZ_STEP, IMGSZ_MIN, IMGSZ_MAX = 32, 32, 4096  # the largest stride of YOLOv8 is 32

Precision = Literal["fp32", "fp16", "int8"]
Runtime = Literal["onnxruntime", "openvino", "tensorrt"]
Criterion = Literal["obs", "bn_gamma", "l1", "l2", "fpgm", "lamp", "taylor", "hessian", "activation", "random"]
FeatureLoss = Literal["weighted_l2", "fitnet", "cwd", "pkd", "mgd", "attention", "relation"]
Calibrator = Literal["max", "percentile", "mse", "entropy"]
Scratch = Literal["yolov8n.yaml", "yolov8s.yaml", "yolov8m.yaml", "yolov8l.yaml", "yolov8x.yaml"]


def imgsz_value(value: Any) -> Any:
    """Brings `640`, `[384, 640]` and `384,640` to one form: an int for a square, (height, width) otherwise."""
    given = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    sides: list[Any] = [strict_yaml.resolve(side.strip()) if isinstance(side, str) else side for side in given]
    if len(sides) not in (1, 2) or not all(type(side) in (int, float) and math.isfinite(side) for side in sides):
        raise ValueError("expected one side or height,width in pixels, as in 640 or 384,640")
    for side in sides:
        if type(side) is not int or side % IMGSZ_STEP or not IMGSZ_MIN <= side <= IMGSZ_MAX:
            near = round(min(max(side, IMGSZ_MIN), IMGSZ_MAX) / IMGSZ_STEP) * IMGSZ_STEP
            limits = f"multiples of {IMGSZ_STEP} from {IMGSZ_MIN} to {IMGSZ_MAX}"
            raise ValueError(f"expected {limits}; the nearest to {side} is {near}")
    return sides[0] if len(set(sides)) == 1 else tuple(sides)


def device_value(value: Any) -> Any:
    """Makes the YAML number `0` the device "0"; refuses what is neither cpu nor CUDA indices."""
    text = str(value) if type(value) is int else value
    indices = text.split(",") if isinstance(text, str) else []
    if text != "cpu" and (not all(re.fullmatch("[0-9]{1,3}", i) for i in indices) or len(set(indices)) < len(indices)):
        raise ValueError("expected cpu or CUDA indices, as in 0 or 0,1")
    return text


def several(value: Any) -> Any:
    """Makes a list, or the command line's `fp32,int8`, a tuple without repeats."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        return value
    items = tuple(item.strip() if isinstance(item, str) else item for item in items)
    if len({repr(item) for item in items}) < len(items):
        raise ValueError("expected each item once")
    return items


def runtimes_value(value: Any) -> Any:
    return value if value == "auto" else several(value)


def knob(text: str, allowed: str | None = None, **limits: Any) -> Any:
    """Documents a knob: what it does, its limits and, where types and limits do not say it, the values it takes."""
    return Field(description=text, json_schema_extra={"allowed": allowed} if allowed else None, **limits)


# Knobs that several stages share, each with its own default.
TEXT = r"(?s)\S.*"  # a name is not blank
Epochs = Annotated[int, knob("passes over the training images", ge=0, le=100_000)]
SomeEpochs = Annotated[int, knob("passes over the training images", ge=1, le=100_000)]
Batch = Annotated[int, knob("images a step; the optimizer steps on every batch", ge=1, le=4096)]
Optimizer = Annotated[Literal["SGD", "AdamW", "Adam"], knob("optimizer")]
Lr0 = Annotated[float, knob("learning rate after warm-up", gt=0, le=1)]
WarmupEpochs = Annotated[float, knob("epochs of learning-rate warm-up; a fraction is fine", ge=0, le=1000)]
Cosine = Annotated[bool, knob("cosine schedule down to lr0*lrf instead of a straight line")]
Mosaic = Annotated[float, knob("probability that a training image is a mosaic of four", ge=0, le=1)]
CloseMosaic = Annotated[int, knob("last epochs that see whole images, without mosaic", ge=0)]
Weights = Annotated[
    str | None,
    knob(
        "checkpoint to take; looked up as given, then in weights/. Nothing is trained then. null: train from `model`",
        pattern=TEXT,
    ),
]
Model = Annotated[Scratch, knob("architecture trained from scratch; used only where weights is null")]
CalibImages = Annotated[int, knob("un-augmented training images that calibrate the ranges", ge=1, le=100_000)]
CalibratorKnob = Annotated[Calibrator, knob("how a range is chosen from the values seen")]
Percentile = Annotated[
    float, knob("percentage of values inside the range; for calibrator=percentile only", gt=50, le=100)
]
Threads = Annotated[int | None, knob("threads of the CPU runtimes; null: their own choice", ge=1, le=1024)]
