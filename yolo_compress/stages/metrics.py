"""The metrics of each stage, as its manifest holds them. `report` has its own beside its code.

Words that hold throughout:
    mAP is a fraction from 0 to 1, over the validation images, by pycocotools. `map50_95` is the mean over IoU 0.5 to 0.95.
    Times end in `_ms`, sizes in `_mib` (2**20 bytes), pixels in `_px`. `compute_gflops` is 2 x GMACs of one image.
    A key that is `NotRequired` is absent where its comment says so.

`tests/support/stage_schema.py` validates a finished chain against these types and forbids any other key.
"""

from __future__ import annotations

from typing import Literal, NotRequired, cast

from typing_extensions import TypedDict

from yolo_compress.evaluate.rows import BenchRow
from yolo_compress.runtime.measure.device import DeviceState
from yolo_compress.store.manifest import Artifact


class Validated(TypedDict):
    """What a model of torch scores."""

    map50_95: float
    map50: float
    images: int  # validation images


class ModelMetrics(Validated):
    """Of every stage that writes a `model.pt`, and all that `baseline` and `teacher` state."""

    parameters: int
    compute_gflops: float
    sparsity: float  # share of exact zeros among the weights of all convolutions
    size_mib: float  # of `model.pt`
    epochs: int  # that it was trained for; 0 where the weights were given


class SparsifyMetrics(ModelMetrics):
    # Percentage of channels -> share of the whole gamma mass that the weakest of them hold.
    gamma_mass_under_cut_before: dict[str, float]  # training
    gamma_mass_under_cut_after: dict[str, float]


class Repaired(TypedDict):
    """mAP before any fine-tuning."""

    map50_95_after_cut: float
    map50_95_after_bn: float  # after BatchNorm's averages were re-estimated


class LatencyBudget(TypedDict, total=False):
    """Of a budget in milliseconds; absent for another."""

    latency_target_ms: float  # as asked for
    latency_runtime: str  # that it is for
    latency_expected_ms: float  # by a table that was given; absent where the model was timed here
    latency_measured_ms: float  # of the pruned model, built and timed here; absent where a table was given
    latency_dense_ms: float  # of the model before pruning, timed in turn with it


class Cut(Repaired, LatencyBudget):
    """What cutting channels states."""

    kept_flops: float  # FLOPs after / before


class Zeroed(Repaired):
    """What pruning to zeros states."""

    kind: Literal["unstructured", "two_four"]


class PruneMetrics(ModelMetrics, Repaired, LatencyBudget):
    kept_flops: NotRequired[float]  # FLOPs after / before; absent for zeros
    kind: NotRequired[Literal["unstructured", "two_four"]]  # absent where channels were cut


class DistillMetrics(ModelMetrics):
    trained_on: NotRequired[str]  # a phrase on the images of a distillation without labels; absent with labels


class Sensitive(TypedDict, total=False):
    """Of `qat.sensitivity`; absent where it is off."""

    sensitivity_enough: bool  # whether the groups left in float keep the loss within `qat.max_drop`
    float_price_ms: float  # that these groups take longer in float; absent where their price is GFLOPs


class QatMetrics(ModelMetrics, Sensitive):
    """mAP is that of the quantised model."""

    map50_95_float_weights: float  # of the same weights without quantisers
    calibration_set: str  # digest of the calibration images
    calibration_images: int
    weight_bits: int
    quantised_convs: int
    float_groups: list[str]  # groups of tensors that stay in float: those of the recipe, and those of the sensitivity


class FloatFiles(TypedDict):
    """The largest differences between the FP32 ONNX and torch."""

    max_score_difference: float
    max_box_difference_px: float


class Int8Files(TypedDict):
    int8_convs: int  # convolutions with quantised weights
    int8_from: str  # "qat", or "ptq (<calibrator>)"


class NmsFiles(TypedDict):
    """How much of the files with NMS in the graph was compared with those without."""

    nms_images: int
    nms_boxes: int


class ExportedModel(FloatFiles):
    """The files of one model."""

    int8_convs: NotRequired[int]  # see `Int8Files`; absent without INT8, as `int8_from`
    int8_from: NotRequired[str]
    nms_images: NotRequired[int]  # see `NmsFiles`; absent without `export.nms`, as `nms_boxes`
    nms_boxes: NotRequired[int]


class ExportMetrics(TypedDict):
    original: ExportedModel
    compressed: ExportedModel


class EngineMetrics(TypedDict):
    """Rows of `engines.json`."""

    engines: int  # that were built
    missing: int  # that were not


class BenchMetrics(TypedDict):
    rows: list[BenchRow]  # one a model, runtime and precision
    images: int  # validation images
    device: DeviceState  # the machine, after the measurement


def of_model(artifact: Artifact) -> ModelMetrics:
    """The metrics of any stage that writes a model, whichever it is: a stage that a recipe leaves out is replaced."""
    return cast(ModelMetrics, artifact.metrics)
