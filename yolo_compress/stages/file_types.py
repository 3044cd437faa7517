"""Types of the JSON files that stages write, in the artefact or in `work`.

Simple files have no type here:
    channels.json of `prune`: layer -> output channels [before, after].
    flops.json of `prune`: convolution -> MACs of one image [before, after].
    latency.json of `bench`: name of a row -> list per round of the latencies of its calls, in ms.
"""

from __future__ import annotations

from typing_extensions import TypedDict

from yolo_compress.report.schema import Measure
from yolo_compress.stages.metrics import LatencyBudget


class CalibrationImage(TypedDict):
    """An entry of calibration.json: one calibration image."""

    name: str
    sha256: str  # SHA-256 of the file, in hex


class PruneSensitivityBegun(TypedDict, total=False):
    """The unfinished sensitivity.json in `work` of `prune`. The finished one is a `report.schema.SensitivityFile`."""

    groups: dict[str, list[float]]
    dense: float


class AskedMs(TypedDict):
    """asked.json in `work` of `prune`: the limit on the sum of the layer times, in ms.

    A pruned model whose layer times add up to `asked_ms` met `latency_ms` when the whole model was timed.
    """

    asked_ms: float
    metrics: LatencyBudget


# A key has the name `float`. In a class body it would hide the type `float` in the lines below it.
QatSensitivity = TypedDict(  # noqa: UP013
    "QatSensitivity",
    {
        "groups": dict[str, float],  # group -> measure with only that group in float
        "float": float,  # measure of the float model
        "int8": float,  # measure of the INT8 model
        "layer_ms": dict[
            str, tuple[float, float]
        ],  # convolution -> ms [in float, in INT8]; absent if the cost is in GFLOPs
        "compute_gflops": dict[str, float],  # group -> sum of the GFLOPs of its convolutions
        "price_ms": dict[str, float],  # group -> additional ms in float; absent if `layer_ms` is
        "measure": Measure,
        "images": int,  # number of calibration images for the measurement
        "worst": float,  # limit: least mAP, or largest loss
        "left": list[str],  # groups that stay in float
        "then": float,  # measure with the groups of `left` in float
        "price": str,  # unit of the cost of float: "gflops", or the runtime whose latency in ms is the cost
    },
    total=False,
)
"""sensitivity.json of `qat`, measured with one group of tensors in float at a time. In `work` it may be unfinished."""
