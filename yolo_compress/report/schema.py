"""The types of `report.json`, schema 3: every key with its meaning and unit.

Conventions:
    mAP is a fraction from 0 to 1, over the validation images, by pycocotools. `map50_95` is the mean over IoU 0.5 to 0.95.
    The unit of a key is its suffix: `_ms`, `_mib` (2**20 bytes), `_px` (pixels).
    `compute_gflops` is 2 x GMACs of one image. Intervals are 95 %, by bootstrap over the validation images.
    As value of `model`, "original" is the baseline and "compressed" is the compressed model.
    null means not measured, or NaN or infinite. A `NotRequired` key is absent where its comment says so.

`tests/unit/report/test_schema.py` validates documents against these types and forbids all other keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NotRequired

from typing_extensions import TypeAliasType, TypedDict  # pydantic reads typing's own from Python 3.12 on

from yolo_compress.evaluate.ab.schema import AB
from yolo_compress.evaluate.cascade.schema import CascadeDocument
from yolo_compress.evaluate.rows import Model, Signature
from yolo_compress.evaluate.tide import ModelErrors
from yolo_compress.runtime.registry import Precision

# New in 3: rows of files without an engine ("untimed"), gate.timed, McNemar's test by image.
# New in 2: ab, errors, placement, devices.
SCHEMA: Final = 3

Json = TypeAliasType("Json", "bool | int | float | str | list[Json] | dict[str, Json] | None")

Status = Literal["ok", "untimed", "missing"]
Measure = Literal["loss", "map50_95"]


# Bench rows


class Interval(TypedDict, total=False):
    """Ends of 95 % intervals of mAP. The keys are absent if no detections are stored or `report.ab_replicates` is 0."""

    map50_95_low: float | None
    map50_95_high: float | None
    # Ends for the paired difference in map50_95 from the baseline; absent for the baseline itself.
    delta_low: float | None
    delta_high: float | None


class _Subject(TypedDict):
    """Keys of every bench row: model, runtime and precision."""

    id: str  # model-runtime-precision, followed by -device for another machine
    model: Model
    runtime: str  # name of the runtime, such as "openvino"; in an untimed row, the target runtime of the file
    precision: Precision  # as requested
    reason: str | None  # why there is no engine or no measurement
    choice: NotRequired[str]  # why the engine was built from `file`; absent if there was only one file to build from
    gpu: NotRequired[str]  # name of the GPU that torch computed on; absent on a CPU and for engines
    file: NotRequired[
        str | None
    ]  # the exported file that the engine is built from; null for torch, absent for a device
    parameters: NotRequired[int | None]  # absent for a device
    compute_gflops: NotRequired[float | None]  # absent for a device
    device: NotRequired[str]  # name of the other machine; absent for this one
    library: NotRequired[str | None]  # version of the runtime on the device
    golden: NotRequired[
        dict[str, Json] | None
    ]  # a device's self-test on golden images: `passed`, `reason`, largest errors


class _Accuracy(_Subject, Interval):
    """The accuracy of an engine or a file."""

    executed: str | None  # precision that the runtime really computed in
    map50_95: float | None  # null on a device that had no validation images
    map50: float | None
    map50_95_ultralytics: NotRequired[
        float | None
    ]  # map50_95 as Ultralytics' validator computes it; absent for a device
    per_class: NotRequired[dict[str, float | None] | None]  # map50_95 by class name
    images: NotRequired[int | None]  # number of images that a device evaluated
    image_set: NotRequired[str | None]  # digest of the validation images and their boxes
    signature: NotRequired[Signature | None]


class _Latency(TypedDict):
    """Latency of one inference, and size of the engine."""

    latency_p50_ms: float | None
    latency_p90_ms: float | None  # a percentile is null if too few calls were timed for it
    latency_p95_ms: NotRequired[float | None]
    latency_p99_ms: float | None
    latency_n: int | None  # timed calls
    latency_quiet: NotRequired[
        bool | None
    ]  # whether other programs were idle in all rounds, and the engine between them
    threads: NotRequired[int | None]  # threads of one inference on a CPU; null: all processors
    size_mib: NotRequired[float | None]  # size of the engine; absent for a device


class _OnDevice(TypedDict, total=False):
    """Further measurements of a device. Null: the device cannot measure this. For this machine the keys are absent."""

    # Time from a decoded image to its detections, one image after another.
    end_to_end_p50_ms: float | None
    end_to_end_p90_ms: float | None
    end_to_end_p95_ms: float | None
    end_to_end_p99_ms: float | None
    end_to_end_n: int | None  # timed calls
    fps: float | None  # throughput: decoded images per second with several images in flight
    memory_mib: float | None  # memory of the process that runs the engine
    power_w: float | None  # mean power during the throughput measurement
    idle_w: float | None  # power when idle
    energy_mj_per_frame: float | None  # mJ per image during the throughput measurement


class MeasuredBenchRow(_Accuracy, _Latency, _OnDevice):
    """An engine, or a model in torch, that was evaluated and timed."""

    status: Literal["ok"]


class UntimedBenchRow(_Accuracy):
    """A file that no engine on this machine was built from. It has an accuracy, but no latency and no size."""

    status: Literal["untimed"]


class MissingBenchRow(_Subject):
    """A requested measurement that failed or was not possible. A device writes all keys of a measured row, with null as value."""

    status: Literal["missing"]
    executed: NotRequired[None]
    map50_95: NotRequired[None]
    map50: NotRequired[None]
    per_class: NotRequired[None]
    images: NotRequired[None]
    image_set: NotRequired[None]
    latency_p50_ms: NotRequired[None]
    latency_p90_ms: NotRequired[None]
    latency_p95_ms: NotRequired[None]
    latency_p99_ms: NotRequired[None]
    latency_n: NotRequired[None]
    latency_quiet: NotRequired[None]
    threads: NotRequired[None]
    end_to_end_p50_ms: NotRequired[None]
    end_to_end_p90_ms: NotRequired[None]
    end_to_end_p95_ms: NotRequired[None]
    end_to_end_p99_ms: NotRequired[None]
    end_to_end_n: NotRequired[None]
    fps: NotRequired[None]
    memory_mib: NotRequired[None]
    power_w: NotRequired[None]
    idle_w: NotRequired[None]
    energy_mj_per_frame: NotRequired[None]


EvaluatedBenchRow = MeasuredBenchRow | UntimedBenchRow
BenchRow = EvaluatedBenchRow | MissingBenchRow  # before the report adds its ratios


class _Ratios(TypedDict):
    """Keys that the report adds to every bench row."""

    retention: float | None  # map50_95 / map50_95 of the gate's reference
    speed_up: float | None  # p50 latency of the FP32 baseline on the same runtime and device / p50 latency of this row
    size_ratio: float | None  # size of the FP32 baseline on the same runtime and device / size of this row
    notes: list[str]  # remarks on the figures of this row


class MeasuredRow(MeasuredBenchRow, _Ratios):
    """`MeasuredBenchRow` in the report. latency_p99_ms is null below 662 timed calls."""


class UntimedRow(UntimedBenchRow, _Ratios):
    """`UntimedBenchRow` in the report."""


class MissingRow(MissingBenchRow, _Ratios):
    """`MissingBenchRow` in the report."""


Row = MeasuredRow | UntimedRow | MissingRow


class Missing(TypedDict):
    """Missing rows with the same runtime and the same reason."""

    runtime: str
    models: list[Model]
    precisions: list[Precision]
    reason: str
    device: str | None  # null: this machine


# The gate


class Judged(TypedDict):
    """The gate's judgement of one bench row."""

    id: str  # id of the row
    retention: float | None
    passed: bool
    reason: str | None  # null where it passed


class Check(TypedDict):
    """A condition of the gate other than retention."""

    name: str  # "p50" (ms), "size" (MiB) or "signature"
    limit: float | Signature  # largest allowed value; for "signature" that of the baseline
    value: float | Signature | None
    passed: bool
    reason: str | None  # null where it passed


# Whether the retention reaches the accuracy targets of MLPerf Inference, in per cent of FP32
# (https://github.com/mlcommons/inference_policies).
Tiers = TypedDict("Tiers", {"95": bool, "99": bool, "99.9": bool})


class Gate(TypedDict):
    """Result of the gate on retention, latency and size. The worst row decides."""

    min_retention: float  # least retention, 0 to 1
    max_latency_ms: float | None  # largest p50 latency; null: no limit
    max_size_mib: float | None  # largest size of the engine; null: no limit
    reference: str | None  # id of the row that retention is relative to: the baseline in FP32
    judged: list[Judged]
    worst: str | None  # id of the row with the least retention
    timed: str | None  # id of the row with the least retention among those with a latency
    retention: float | None  # retention of the worst row
    tiers: Tiers | None  # null if there is no retention
    checks: list[Check]
    passed: bool
    reason: str | None  # null where it passed


class Verdict(TypedDict):
    """The first line of the report."""

    status: Literal["pass", "fail"]
    line: str
    row: str | None  # id of the worst row


# The stages


class LowRankFigures(TypedDict):
    """What `prune` factorised, and the comparison with channel pruning for the same budget, before any fine-tuning."""

    factors: dict[str, str]  # block -> scheme and ranks, as in "tucker 32, 48"
    convolutions: int  # convolutions of the model before
    loss: float  # mean detection loss over the calibration images
    channel_loss: float | None  # the same after channel pruning alone; null if that cannot meet the budget
    runtime: str | None  # runtime of the measured layer times; null if the budget is not in ms
    recommended: bool  # see `report.low_rank.is_recommended`


class StageFigures(Interval):
    """The model that a stage of the recipe made, with its measurements."""

    stage: str  # "teacher", "baseline", "sparsify", "prune", "distill" or "qat"
    fingerprint: str  # fingerprint of its artefact
    status: str  # "done"
    seconds: float  # run time of the stage
    image_set: str  # as in a bench row
    parameters: int
    compute_gflops: float
    size_mib: float  # size of its checkpoint
    map50_95: float | None
    map50: float | None
    epochs: int | None
    trained_on: NotRequired[str]  # only of a distillation without labels: a phrase that describes its images
    # Only of a distillation with `data.hold_back`: mAP50-95 on the images held back. The stage keeps the better model.
    held_map50_95_before: NotRequired[float | None]
    held_map50_95_after: NotRequired[float | None]
    # Only of prune:
    map50_95_after_cut: NotRequired[float | None]
    map50_95_after_bn: NotRequired[float | None]  # after re-estimating BatchNorm, before any training
    kept_flops: NotRequired[float]  # FLOPs after / before
    bottlenecks: NotRequired[dict[str, list[int]]]  # layer -> bottlenecks [before, after]; absent without `prune.depth`
    low_rank: NotRequired[LowRankFigures]  # absent if no convolution was factorised
    latency_target_ms: NotRequired[float]
    latency_measured_ms: NotRequired[float]
    latency_runtime: NotRequired[str]  # runtime of the latency target
    # Only of the baseline and of the compressed float model, from their torch row in bench:
    latency_p50_ms: NotRequired[float | None]
    latency_p90_ms: NotRequired[float | None]
    latency_p99_ms: NotRequired[float | None]


class ChainStage(StageFigures):
    """A stage as the report shows it."""

    delta_map50_95: float | None  # map50_95 minus the baseline's; null for the baseline and the teacher


class ControlStep(TypedDict):
    """A model between the baseline and the compressed model, and what it has more than the model of the step before."""

    name: str  # "baseline", "longer", "taught", "narrowed" or "compressed"
    map50_95: float | None  # of the float model in torch
    map50: float | None
    compute_gflops: float
    parameters: int
    epochs: int  # epochs of training after the baseline
    adds: list[str]  # what this model has more than that of the step before; empty for the baseline
    change: float | None  # map50_95 minus that of the step before; null for the baseline
    change_low: NotRequired[float | None]  # ends of its 95 % interval, over the same images; absent as in `Interval`
    change_high: NotRequired[float | None]


class Control(TypedDict):
    """Comparison of the compressed model with models that were trained like it, but lack parts of the chain (`stages.control`)."""

    steps: list[ControlStep]  # from the baseline to the compressed model; empty if no control was trained
    best: str | None  # name of the control with the highest map50_95
    retention: float | None  # map50_95 of the row that the gate judges / that of the best control
    skipped: str | None  # why no control was trained


class Gammas(TypedDict):
    """Histograms of the absolute BatchNorm gammas while `sparsify` trains."""

    edges: list[float]  # edges of the bins, one more than bins
    epochs: list[list[int]]  # counts per bin, one list per epoch; the first is before training


class SensitivityFile(TypedDict):
    """Sensitivity to pruning, measured with channels removed from one group at a time."""

    measure: Measure
    dense: float  # measure of the model before pruning
    ratios: list[float]  # removed shares of the group's channels, ascending
    groups: Mapping[str, Sequence[float | None]]  # group -> measure at each ratio
    caps: Mapping[str, float | None]  # group -> largest share that pruning may remove; null: no limit
    images: int  # number of images for the measurement


class SensitiveGroup(TypedDict):
    group: str
    mean_change: float | None  # mean over the ratios of the change of the measure; null if one is not a number


class Sensitivity(SensitivityFile):
    most_sensitive: list[SensitiveGroup]  # at most 5, the worst first


# A key of the file has the name `float`. In a class body it would hide the type `float` in the lines below it.
_InFloat = TypedDict("_InFloat", {"float": float})  # noqa: UP013


class QuantisationFile(_InFloat):
    """Sensitivity to INT8, by `qat.sensitivity`. One group of tensors at a time is in float, and all other groups are in INT8.

    The measure is mAP or the loss. The key `float` has the measure of the float model.
    """

    measure: Measure
    int8: float  # measure of the INT8 model
    worst: float  # limit: least mAP, or largest loss
    then: float  # measure with the groups of `left` in float
    left: list[str]  # groups that stay in float
    images: int  # number of calibration images for the measurement
    groups: dict[str, float]  # group -> measure with only that group in float
    price: str  # unit of the cost of float: "gflops", or the runtime whose latency in ms is the cost
    compute_gflops: dict[str, float]  # group -> sum of the GFLOPs of its convolutions
    price_ms: NotRequired[dict[str, float]]  # group -> additional ms in float; absent if the cost is in GFLOPs
    layer_ms: NotRequired[dict[str, list[float]]]  # convolution -> ms [in float, in INT8]; absent if `price_ms` is


class Quantisation(QuantisationFile):
    gives_back: dict[str, float]  # group -> gain with only that group in float: rise of mAP, or fall of the loss


class Tensor(TypedDict):
    """A row of `placement.csv`: a tensor between two layers in the INT8 graph."""

    tensor: str
    precision: str  # "int8" or "float"
    group: str  # tensors of a group share one scale
    why: str  # reason for its precision


# Error types


class ErrorTypes(TypedDict):
    """TIDE's error types of the baseline (a) and of the compressed model (b)."""

    conf: float
    a: ModelErrors  # over all detections
    b: ModelErrors
    shown_a: ModelErrors  # over detections with a score above conf
    shown_b: ModelErrors


# Other machines


class DeviceCascade(TypedDict):
    """A cascade that a robot measured. Latencies are means from a decoded image to its detections, except p50 and p99."""

    runtime: str
    map50_95: float | None  # null: measured without --data
    kept: float  # share of the images that only the small model sees
    mean_ms: float
    p50_ms: float | None  # null: too few calls were timed
    p99_ms: float | None
    small_ms: float  # the small model alone
    large_ms: float


class Device(TypedDict):
    """A robot whose `device.json` was added."""

    name: str  # as in its rows
    file: str  # name of the file
    about: dict[str, Json]  # board, processor, power mode and clocks, where the device could read them
    runtime: str | None  # runtime of its first row
    library: str | None  # version of that runtime
    libraries: dict[str, Json] | None  # runtime -> version
    power_from: str | None  # power meter that power_w comes from
    bundle: dict[str, Json]  # name, version and digests of the bundle that it ran
    golden: dict[str, Json] | None  # result of the self-test on golden images, over all engines
    cascades: NotRequired[list[DeviceCascade]]  # absent if it measured none


class Reference(TypedDict):
    """The baseline of another recipe, from its `report.json`, measured on this machine and the same images."""

    id: str
    name: str  # name of the recipe
    runtime: str
    precision: Precision
    map50_95: float | None
    map50_95_low: float | None
    map50_95_high: float | None
    latency_p50_ms: float | None
    parameters: int | None
    compute_gflops: float | None
    size_mib: float | None


# The document


class DataFacts(TypedDict):
    """Name, classes, image counts and digests of the data set. Null means unknown."""

    yaml: str | None  # file name
    names: list[str]  # class names in the order of their index
    train_images: int | None
    val_images: int | None
    skipped: list[str]  # findings on images that were left out
    notes: list[str]
    digest: str | None  # digest of the whole dataset


class Data(DataFacts):
    image_set: str | None  # digest of the images of every mAP in the report


class Reproduce(TypedDict):
    recipe_yaml: str | None  # text of the recipe
    command: str | None


class Environment(TypedDict, total=False):
    """Machine, versions and settings of the run. A key that was not recorded is absent and listed in `not_recorded`."""

    commit: str | None  # "not a checkout" if the code is not in one; null: git did not answer
    device: dict[str, Json]  # `runtime.measure.device.device_state`
    versions: dict[str, str | None]  # library -> version
    imgsz_px: list[int]  # [height, width]
    batch: int  # images per inference
    warm_up: str
    latency: str  # how latency was measured
    seed: int
    report_made_with: str | None  # version of yolo-compress


class Document(TypedDict):
    """Content of `report.json`. The HTML, Markdown and terminal reports are made from this document alone."""

    schema: int  # SCHEMA
    recipe: str  # name of the recipe
    verdict: Verdict
    gate: Gate
    rows: list[Row]  # sorted by device, runtime, model and precision
    missing: list[Missing]
    data: Data
    chain: list[ChainStage]  # in the order in which the stages ran
    control: Control | None  # null if the recipe has no section `control`
    not_tested: list[str]  # sentences on what the run did not test
    not_recorded: list[str]  # keys of `environment` that are absent
    gammas: Gammas | None
    channels: dict[str, list[int]] | None  # layer -> output channels [before, after] pruning
    flops: dict[str, list[int]] | None  # convolution -> MACs of one image [before, after] pruning
    sensitivity: Sensitivity | None
    recovery: (
        list[list[float | None]] | None
    )  # [epoch, map50_95] of fine-tuning after pruning, by Ultralytics' validator
    ab: AB | None
    errors: ErrorTypes | None
    latency_quantiles: dict[str, list[float]] | None  # row id -> latencies in ms at the quantiles 0, 1, ..., 100 %
    quantisation: Quantisation | None
    placement: list[Tensor]
    devices: list[Device]
    references: list[Reference]
    cascades: NotRequired[list[CascadeDocument]]  # of `cascade.json` that was added; absent if none was
    reproduce: Reproduce
    environment: Environment
