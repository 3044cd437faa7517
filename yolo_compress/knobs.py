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
Auto = Literal["auto"]  # from the number of training images, by the rules of `sizing.py`


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


def number(value: int | Auto) -> int:
    """The value of a knob after `sizing.resolve`, which leaves no `auto`."""
    assert value != "auto"
    return value


def knob(text: str, allowed: str | None = None, **limits: Any) -> Any:
    """Documents a knob: what it does, its limits and, where types and limits do not say it, the values it takes."""
    return Field(description=text, json_schema_extra={"allowed": allowed} if allowed else None, **limits)


# Knobs that several stages share, each with its own default.
TEXT = r"(?s)\S.*"  # a name is not blank
Epochs = Annotated[
    Annotated[int, Field(ge=0, le=100_000)] | Auto,
    knob("passes over the training images; auto: by their number"),
]
SomeEpochs = Annotated[
    Annotated[int, Field(ge=1, le=100_000)] | Auto,
    knob("passes over the training images; auto: by their number"),
]
Batch = Annotated[
    Annotated[int, Field(ge=1, le=4096)] | Auto,
    knob("images a step; the optimizer steps on every batch. auto: by the number of training images"),
]
Optimizer = Annotated[Literal["SGD", "AdamW", "Adam"], knob("optimizer")]
SourceOptimizer = Annotated[
    Literal["SGD", "AdamW", "Adam", "MuSGD"] | Auto,
    knob(
        "optimizer; auto: as Ultralytics, AdamW for a short training, MuSGD for one of more than 10,000 steps of 64 images"
    ),
]
Lr0 = Annotated[float, knob("learning rate after warm-up", gt=0, le=1)]
SourceLr0 = Annotated[
    Annotated[float, Field(gt=0, le=1)] | Auto,
    knob("learning rate after warm-up; auto: as Ultralytics, 0.002 * 5 / (4 + classes) for Adam and AdamW, else 0.01"),
]
WarmupEpochs = Annotated[float, knob("epochs of learning-rate warm-up; a fraction is fine", ge=0, le=1000)]
Cosine = Annotated[bool, knob("cosine schedule down to lr0*lrf instead of a straight line")]
Mosaic = Annotated[float, knob("probability that a training image is a mosaic of four", ge=0, le=1)]
CloseMosaic = Annotated[
    Annotated[int, Field(ge=0)] | Auto,
    knob("last epochs that see whole images, without mosaic; auto: a fifth of the epochs, at most 10"),
]
Weights = Annotated[
    str | None,
    knob(
        "finished detector of the data set's classes, taken as it is; looked up as given, then in weights/",
        pattern=TEXT,
    ),
]
Pretrained = Annotated[
    str | None,
    knob(
        "checkpoint of any classes to start the training from: all of it but the outputs of classes that the data set does "
        "not name; looked up as given, then in weights/",
        pattern=TEXT,
    ),
]
Model = Annotated[Scratch | None, knob("architecture to train from random weights")]
CalibImages = Annotated[int, knob("un-augmented training images that calibrate the ranges", ge=1, le=100_000)]
CalibratorKnob = Annotated[Calibrator, knob("how a range is chosen from the values seen")]
Percentile = Annotated[
    float, knob("percentage of values inside the range; for calibrator=percentile only", gt=50, le=100)
]
Threads = Annotated[int | None, knob("threads of the CPU runtimes; null: their own choice", ge=1, le=1024)]
