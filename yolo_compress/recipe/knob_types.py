"""Types of knobs (settings of a recipe): accepted values, limits and help of the knobs that several sections share.

`knob` adds help and limits to a field. The defaults of all knobs, and the knobs of a single section, are in `sections.py`.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field
from pydantic.fields import FieldInfo

from ..files import strict_yaml
from ..runtime import registry
from .choices import CRITERIA, FEATURE_LOSSES

IMGSZ_STEP, IMGSZ_MIN, IMGSZ_MAX = 32, 32, 4096  # the largest stride of YOLOv8 is 32

if TYPE_CHECKING:  # a type checker cannot read the values of a Literal from a table
    Runtime = str
    TimedRuntime = str
    FloatCost = str
    Criterion = str
    FeatureLoss = str
else:
    Runtime = Literal[registry.names()]
    TimedRuntime = Literal[registry.names(times_layers=True)]
    FloatCost = Literal[("gflops", *registry.names(gpu=False, times_layers=True))]
    Criterion = Literal[tuple(CRITERIA)]
    FeatureLoss = Literal[tuple(FEATURE_LOSSES)]
OwnFunction = Annotated[str, Field(pattern=r"\.py:\w+$")]  # file.py:function
ControlNet = Literal["longer", "taught", "narrowed"]  # in the order of what each adds
Calibrator = Literal["max", "percentile", "mse", "entropy"]
Scratch = Literal[
    "yolov8n.yaml", "yolov8s.yaml", "yolov8m.yaml", "yolov8l.yaml", "yolov8x.yaml",
    "yolov8n-p2.yaml", "yolov8s-p2.yaml", "yolov8m-p2.yaml", "yolov8l-p2.yaml", "yolov8x-p2.yaml",
    "yolov8n-p6.yaml", "yolov8s-p6.yaml", "yolov8m-p6.yaml", "yolov8l-p6.yaml", "yolov8x-p6.yaml",
    "yolo11n.yaml", "yolo11s.yaml", "yolo11m.yaml", "yolo11l.yaml", "yolo11x.yaml",
    "yolo26n.yaml", "yolo26s.yaml", "yolo26m.yaml", "yolo26l.yaml", "yolo26x.yaml",
]  # fmt: skip
Auto = Literal["auto"]  # from the number of training images, by the rules of `auto_values.py`


def imgsz_value(value: Any) -> Any:
    """Return an int for a square size, else (height, width). Takes `640`, `[384, 640]` and `384,640`.

    Raises:
        ValueError: The value is not one or two multiples of 32 within the limits.
    """
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
    """Return the device as text: the YAML number `0` becomes "0".

    Raises:
        ValueError: The value is not cpu, and not a list of different CUDA indices.
    """
    text = str(value) if type(value) is int else value
    indices = text.split(",") if isinstance(text, str) else []
    if text != "cpu" and (not all(re.fullmatch("[0-9]{1,3}", i) for i in indices) or len(set(indices)) < len(indices)):
        raise ValueError("expected cpu or CUDA indices, as in 0 or 0,1")
    return text


def as_tuple(value: Any) -> Any:
    """Return a list, or the command line's `fp32,int8`, as a tuple. Other values are returned unchanged.

    Raises:
        ValueError: An item is repeated.
    """
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        return value
    items = tuple(item.strip() if isinstance(item, str) else item for item in items)
    if len({repr(item) for item in items}) < len(items):
        raise ValueError("expected each item once")
    return items


def auto_or_tuple(value: Any) -> Any:
    """Return "auto", or the items as a tuple (`as_tuple`)."""
    return value if value == "auto" else as_tuple(value)


def as_range(value: Any) -> Any:
    """Return the range `0.3,0.8` of the command line, or a list of two numbers, as a tuple of floats. Other values are unchanged.

    Raises:
        ValueError: The first number is above the second one.
    """
    items = _numbers(value)
    if not isinstance(items, tuple) or len(items) != 2 or not all(type(item) in (int, float) for item in items):
        return items
    low, high = (float(item) for item in items)
    if low > high:
        raise ValueError("expected the smaller number first, as in 0.3,0.8")
    return low, high


def as_numbers(value: Any) -> Any:
    """Return one number, a list, or the command line's `8,16`, as a tuple. Other values are returned unchanged.

    Raises:
        ValueError: An item is repeated.
    """
    items = _numbers(value)
    if isinstance(items, tuple) and len(set(map(repr, items))) < len(items):
        raise ValueError("expected each number once")
    return items


def _numbers(value: Any) -> Any:
    items = value.split(",") if isinstance(value, str) and "," in value else value
    if type(items) in (int, float):
        return (items,)
    if not isinstance(items, list | tuple) or not items:
        return value
    return tuple(strict_yaml.resolve(item.strip()) if isinstance(item, str) else item for item in items)


def number(value: int | Auto) -> int:
    """Return the value of a knob as an int. Call it after `auto_values.resolve`, which replaces every `auto`."""
    assert value != "auto"
    return value


Group = Literal[
    "Goal", "Space", "Data", "Machine", "Model", "Penalty", "Budget", "Criterion", "Teacher", "Loss", "Calibration", "Precision",
    "Files", "Engine", "Measurement", "Gate", "Comparison", "Training", "Advanced",
]  # fmt: skip
GROUPS: tuple[Group, ...] = get_args(Group)  # the order in which the help shows them


class Words(NamedTuple):
    """Help of a knob, without default and allowed values."""

    text: str  # what the knob does
    when: str  # when to change it
    group: Group
    unit: str  # empty if the values have no unit


def knob(text: str, *, when: str, group: Group, unit: str = "", allowed: str | None = None, **limits: Any) -> Any:
    """Return a pydantic field with the help and limits of a knob.

    Args:
        text: What the knob does, in sentences.
        when: When to change it, in one sentence of at most 100 characters.
        group: Heading in the help. Only `help --all` shows the group `Advanced`.
        unit: Unit of the values, such as px or images.
        allowed: Description of the allowed values. Without it, help describes them by type and limits.
        limits: Limits for pydantic's `Field`: ge, gt, le, lt, pattern.
    """
    extra: Any = {"when": when, "group": group, "unit": unit} | ({"allowed": allowed} if allowed else {})
    return Field(description=text, json_schema_extra=extra, **limits)


def words(field: FieldInfo) -> Words:
    """Return the help of a knob: the arguments that were given to `knob`."""
    extra: Any = field.json_schema_extra
    return Words(field.description or "", extra["when"], extra["group"], extra["unit"])


# Knobs that several stages share, each with its own default.
# Packed by hand: a few lines a knob instead of a dozen.
# fmt: off
TEXT = r"(?s)\S.*"  # not blank
Epochs = Annotated[Annotated[int, Field(ge=0, le=100_000)] | Auto, knob(
    "Number of passes over the training images. 0: no training. auto: chosen by the number of training images.",
    when="Raise it while mAP still rises at the end of results.csv; lower it for a quick trial.",
    group="Training", unit="epochs")]
SomeEpochs = Annotated[Annotated[int, Field(ge=1, le=100_000)] | Auto, knob(
    "Number of passes over the training images. auto: chosen by the number of training images.",
    when="Raise it while mAP still rises at the end of results.csv; lower it for a quick trial.",
    group="Training", unit="epochs")]
Batch = Annotated[Annotated[int, Field(ge=1, le=4096)] | Auto, knob(
    "Number of images in one training step. auto: chosen by the number of training images.",
    when="Lower it when memory runs out, and lower `lr0` with it.",
    group="Training", unit="images")]
Optimizer = Annotated[Literal["SGD", "AdamW", "Adam"], knob(
    "Optimizer of the training.",
    when="Set SGD for long trainings on large data sets, with lr0=0.01 and momentum=0.937.",
    group="Advanced")]
Lr0 = Annotated[float, knob(
    "Highest learning rate of the training, reached after warm-up.",
    when="Lower it when the loss jumps or becomes NaN. SGD takes about ten times the rate of AdamW.",
    group="Training", gt=0, le=1)]
SourceOptimizer = Annotated[Literal["SGD", "AdamW", "Adam", "MuSGD"] | Auto, knob(
    "Optimizer of the training. auto: the choice of Ultralytics. This is AdamW for up to 10,000 steps of 64 images, and "
    "MuSGD for more.",
    when="Set it only to repeat a training that used another optimizer.",
    group="Advanced")]
SourceLr0 = Annotated[Annotated[float, Field(gt=0, le=1)] | Auto, knob(
    "Highest learning rate of the training, reached after warm-up. auto: the choice of Ultralytics. This is 0.002 * 5 / (4 "
    "+ classes) for AdamW and Adam, and 0.01 for SGD and MuSGD.",
    when="Lower it when the loss jumps or becomes NaN.",
    group="Training")]
WarmupEpochs = Annotated[float, knob(
    "Number of epochs at the start of the training over which the learning rate rises to `lr0`. Fractions are allowed.",
    when="Raise it when the loss jumps in the first epoch.",
    group="Advanced", unit="epochs", ge=0, le=1000)]
Cosine = Annotated[bool, knob(
    "How the learning rate falls from `lr0` to `lr0` * `lrf`. true: along a cosine. false: linearly.",
    when="Change it only to reproduce a training with a linear learning rate.",
    group="Advanced")]
Mosaic = Annotated[float, knob(
    "Probability that a training image is a mosaic of four images.",
    when="Lower it (0.5) in short trainings: unchanged images are more like those of validation.",
    group="Training", unit="fraction", ge=0, le=1)]
CloseMosaic = Annotated[Annotated[int, Field(ge=0)] | Auto, knob(
    "Number of epochs without mosaic at the end of the training. auto: a fifth of the epochs, at most 10.",
    when="Set a tenth to a fifth of the epochs. Set 0 when the knob mosaic is 0.",
    group="Training", unit="epochs")]
Weights = Annotated[str | None, knob(
    "Checkpoint that already detects the classes of the data set. It is used without training. Its path is tried as given, "
    "then in weights/, then in the folders of YOLO_COMPRESS_WEIGHTS. Set only one of `weights`, `pretrained` and `model`.",
    when="Give a file when you have a trained detector of the classes of your data set.",
    group="Model", pattern=TEXT)]
Pretrained = Annotated[str | None, knob(
    "Checkpoint from which the training starts. It may have other classes than the data set: weights for classes that it "
    "lacks are random at the start, all others come from the checkpoint. Its path is tried as given, then in weights/, then in "
    "the folders of YOLO_COMPRESS_WEIGHTS. Set only one of `weights`, `pretrained` and `model`.",
    when="Give a file such as yolov8s.pt when you have no trained detector of your classes.",
    group="Model", pattern=TEXT)]
Model = Annotated[Scratch | None, knob(
    "Architecture to train from random weights. Set only one of `weights`, `pretrained` and `model`.",
    when="Give it only when there is no checkpoint to start from: it needs more data and epochs.",
    group="Model")]
CalibImages = Annotated[int, knob(
    "Number of training images that calibration uses to choose the INT8 scales. They are not augmented.",
    when="Raise it when there are many classes or varied scenes. For COCO, 512 is suitable.",
    group="Calibration", unit="images", ge=1, le=100_000)]
CalibratorKnob = Annotated[Calibrator, knob(
    "How calibration chooses a scale from the values of a tensor. max: no value is clipped. percentile: the knob `percentile` "
    "sets how many values are not clipped. mse: least squared error of rounding and clipping. entropy: least "
    "Kullback-Leibler divergence.",
    when="Try another one when INT8 loses mAP and FP16 does not.",
    group="Calibration")]
Percentile = Annotated[float, knob(
    "Percentage of the values of a tensor that are not clipped. Used only if `calibrator` is percentile.",
    when="Lower it when a few very large values make the scale too coarse.",
    group="Advanced", unit="percent", gt=50, le=100)]
Threads = Annotated[int | None, knob(
    "Number of CPU threads of each engine. null: the runtime chooses.",
    when="Set the number of cores that the robot gives to the detector.",
    group="Measurement", unit="threads", ge=1, le=1024)]
