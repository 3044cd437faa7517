"""Types of the metrics in the manifest of each stage. Those of `report` are in `report.py`.

Conventions:
    mAP is a fraction from 0 to 1, over the validation images, by pycocotools. `map50_95` is the mean over IoU 0.5 to 0.95.
    The unit of a key is its suffix: `_ms`, `_mib` (2**20 bytes), `_px` (pixels). `compute_gflops` is 2 x GMACs of one image.
    A `NotRequired` key is absent where its comment says so.

`tests/support/stage_schema.py` validates the results of a finished recipe against these types and forbids all other keys.
"""

from __future__ import annotations

from typing import Literal, NotRequired, cast

from typing_extensions import TypedDict

from yolo_compress.evaluate.rows import BenchRow
from yolo_compress.report.schema import LowRankFigures
from yolo_compress.runtime.measure.device import DeviceState
from yolo_compress.store.manifest import Artifact


class Validated(TypedDict):
    """Accuracy of a torch model."""

    map50_95: float
    map50: float
    images: int  # number of validation images


class ModelMetrics(Validated):
    """Metrics of every stage that writes a `model.pt`. `baseline` and `teacher` have no other metrics."""

    parameters: int
    compute_gflops: float
    sparsity: float  # share of zeros among the weights of all convolutions
    size_mib: float  # size of `model.pt`
    epochs: int  # epochs of training; 0 if the weights were given


class SparsifyMetrics(ModelMetrics):
    # Percentage of channels, weakest first -> their share of the sum of |gamma|.
    gamma_mass_under_cut_before: dict[str, float]  # before sparse training
    gamma_mass_under_cut_after: dict[str, float]  # after sparse training


class Repaired(TypedDict):
    """mAP after pruning and before fine-tuning."""

    map50_95_after_cut: float
    map50_95_after_bn: float  # after re-estimating BatchNorm


class LatencyBudget(TypedDict, total=False):
    """Metrics of `prune` for a budget in ms. They are absent for other budgets."""

    latency_target_ms: float  # requested latency
    latency_runtime: str  # runtime of the target
    latency_expected_ms: float  # latency by a given table of layer times; absent if the model was timed here
    latency_measured_ms: float  # latency of the pruned model, built and timed here; absent if a table was given
    latency_dense_ms: float  # latency of the model before pruning, timed in turn with the pruned model


class Cut(Repaired, LatencyBudget):
    """Metrics of `prune` if it removed channels or factorised convolutions."""

    kept_flops: float  # FLOPs after / before
    bottlenecks: NotRequired[
        dict[str, tuple[int, int]]
    ]  # layer -> bottlenecks [before, after]; absent without `prune.depth`
    low_rank: NotRequired[LowRankFigures]  # absent if no convolution was factorised


class Zeroed(Repaired):
    """Metrics of `prune` if it set weights to zero."""

    kind: Literal["unstructured", "two_four"]


class PruneMetrics(ModelMetrics, Repaired, LatencyBudget):
    kept_flops: NotRequired[float]  # FLOPs after / before; absent for zeros
    bottlenecks: NotRequired[dict[str, tuple[int, int]]]  # as in `Cut`
    low_rank: NotRequired[LowRankFigures]  # as in `Cut`
    kind: NotRequired[Literal["unstructured", "two_four"]]  # absent if channels were cut


class HeldBack(TypedDict, total=False):
    """Metrics of `distill` on the training images that are held back; absent without `data.hold_back`.

    The model with the higher value is the result of the stage.
    """

    held_map50_95_before: float  # mAP50-95 of the student before distillation
    held_map50_95_after: float


class DistillMetrics(ModelMetrics, HeldBack):
    trained_on: NotRequired[
        str
    ]  # a phrase that describes the images of a distillation without labels; absent with labels


class Sensitive(TypedDict, total=False):
    """Metrics of the INT8 sensitivity analysis. They are absent if `qat.sensitivity` is off."""

    sensitivity_enough: bool  # whether `qat.max_drop` is met with the chosen groups in float
    float_price_ms: float  # additional ms of these groups in float; absent if the cost is in GFLOPs


class QatMetrics(ModelMetrics, Sensitive):
    """Metrics of `qat`. mAP is measured on the quantised model."""

    map50_95_float_weights: float  # mAP of the same weights without quantisers
    calibration_set: str  # digest of the calibration images
    calibration_images: int
    weight_bits: int
    quantised_convs: int
    float_groups: list[str]  # groups of tensors that stay in float, by the recipe or by the sensitivity


class FloatFiles(TypedDict):
    """Largest differences between the FP32 ONNX file and torch."""

    max_score_difference: float
    max_box_difference_px: float


class Int8Files(TypedDict):
    int8_convs: int  # number of convolutions with quantised weights
    int8_from: str  # "qat", or "ptq (<calibrator>)"


class NmsFiles(TypedDict):
    """Number of images and boxes on which the files with NMS in the graph were compared with the files without."""

    nms_images: int  # number of images
    nms_boxes: int  # number of boxes


class ExportedModel(FloatFiles):
    """Metrics of `export` on the files of one model."""

    # See `Int8Files`; absent without INT8.
    int8_convs: NotRequired[int]
    int8_from: NotRequired[str]
    # See `NmsFiles`; absent without `export.nms`.
    nms_images: NotRequired[int]
    nms_boxes: NotRequired[int]


class ExportMetrics(TypedDict):
    original: ExportedModel
    compressed: ExportedModel


class EngineMetrics(TypedDict):
    """Metrics of `engine`: how many engines were built, and how many could not be built."""

    engines: int  # engines that were built
    missing: int  # engines that could not be built


class BenchMetrics(TypedDict):
    rows: list[BenchRow]  # one per model, runtime and precision
    images: int  # number of validation images
    device: DeviceState  # state of the machine after the measurement


class ControlMetrics(TypedDict):
    """Metrics of `control`."""

    models: dict[str, ModelMetrics]  # control -> metrics; empty if none was trained
    expected_minutes: float  # time of all controls, estimated before they train
    skipped: str | None  # why none was trained


def of_model(artifact: Artifact) -> ModelMetrics:
    """Return the metrics of an artefact with a `model.pt`, of any stage."""
    return cast(ModelMetrics, artifact.metrics)
