"""The JSON files that stages write beside their metrics, or keep in `work` to continue from.

channels.json and flops.json of `prune` map a layer to its output channels, and a convolution to its MACs: [before, after].
latency.json of `bench` maps the name of a row to the ms of its calls, a list a round.
"""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from yolo_compress.stages.metrics import LatencyBudget

Measure = Literal["loss", "map50_95"]


class CalibrationImage(TypedDict):
    """An entry of calibration.json."""

    name: str
    sha256: str  # of the file, hex


class PruneSensitivity(TypedDict):
    """sensitivity.json of `prune`: one group of channels thinned at a time."""

    measure: Measure
    dense: float  # the measure of the model before pruning
    ratios: list[float]  # shares of the group's channels removed, ascending
    groups: dict[str, list[float]]  # group -> the measure at each ratio
    caps: dict[str, float]  # group -> the largest share that pruning may remove
    images: int  # that it was measured on


class PruneSensitivityBegun(TypedDict, total=False):
    """The same in `work`, as far as it is measured."""

    groups: dict[str, list[float]]
    dense: float


class AskedMs(TypedDict):
    """asked.json in `work` of `prune`: which limit by the table gave a model that takes `latency_ms`."""

    asked_ms: float
    metrics: LatencyBudget


# A key is called `float`, which a class body would take for the type from there on.
QatSensitivity = TypedDict(  # noqa: UP013
    "QatSensitivity",
    {
        "groups": dict[str, float],  # group -> the measure with that group alone in float
        "float": float,  # the measure of the float model
        "int8": float,  # of the INT8 model
        "layer_ms": dict[
            str, tuple[float, float]
        ],  # convolution -> ms in float and in INT8; absent with GFLOPs as price
        "compute_gflops": dict[str, float],  # group -> GFLOPs of its convolutions
        "price_ms": dict[str, float],  # group -> ms that it takes longer in float; absent as `layer_ms` is
        "measure": Measure,
        "images": int,  # calibration images that it was measured on
        "worst": float,  # the least mAP, or the largest loss, that is asked for
        "left": list[str],  # groups that stay in float
        "then": float,  # the measure with these in float
        "price": str,  # "gflops", or the runtime whose ms are the price
    },
    total=False,
)
"""sensitivity.json of `qat`: one group of tensors in float at a time. In `work`, as far as it is measured."""
