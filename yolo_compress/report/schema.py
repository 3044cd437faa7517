"""The types of `report.json`, schema 3: every key with its meaning and unit.

Words that hold throughout:
    mAP is a fraction from 0 to 1, over the validation images, by pycocotools. `map50_95` is the mean over IoU 0.5 to 0.95.
    Times end in `_ms`, sizes in `_mib` (2**20 bytes), images in `_px` (pixels).
    `compute_gflops` is 2 x GMACs of one image. Intervals are 95 %, by bootstrap over the validation images.
    In the values of `model`, "original" is the baseline and "compressed" the compressed model.
    null: not measured, or not a number. A key that is `NotRequired` is absent where its comment says so.

`tests/unit/report/test_schema.py` validates documents against these types and forbids any other key.
"""

from __future__ import annotations

from typing import Final, Literal, NotRequired

from typing_extensions import TypeAliasType, TypedDict  # pydantic reads typing's own from Python 3.12 on

from yolo_compress.evaluate.ab.schema import AB
from yolo_compress.evaluate.rows import Signature

# 3: rows of files without an engine ("untimed"), gate.timed, the test by image; 2: ab, errors, placement, devices
SCHEMA: Final = 3

Json = TypeAliasType("Json", "bool | int | float | str | list[Json] | dict[str, Json] | None")

Model = Literal["original", "compressed"]
Precision = Literal["fp32", "fp16", "int8"]
Status = Literal["ok", "untimed", "missing"]
Measure = Literal["loss", "map50_95"]


# Bench rows


class Interval(TypedDict, total=False):
    """Ends of 95 % intervals; absent where no detections are stored or `report.ab_replicates` is 0."""

    map50_95_low: float | None
    map50_95_high: float | None
    # Of the paired difference in map50_95 from the baseline; the baseline has none.
    delta_low: float | None
    delta_high: float | None


class _Subject(TypedDict):
    """What every bench row has: the model, where it runs, and in which precision."""

    id: str  # model-runtime-precision, and -device for another machine
    model: Model
    runtime: str  # a runtime's name, such as "openvino"; of an untimed row the one that the file is made for
    precision: Precision  # as asked for
    reason: str | None  # why there is no engine or no measurement
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

    executed: str | None  # what the runtime really computed in
    map50_95: float | None  # null on a device that had no validation images
    map50: float | None
    map50_95_ultralytics: NotRequired[
        float | None
    ]  # map50_95 as Ultralytics' validator computes it; absent for a device
    per_class: NotRequired[dict[str, float | None] | None]  # map50_95 by class name
    images: NotRequired[int | None]  # how many a device evaluated
    image_set: NotRequired[str | None]  # digest of the validation images and their boxes
    signature: NotRequired[Signature | None]


class _Latency(TypedDict):
    """The latency of one inference, and the size."""

    latency_p50_ms: float | None
    latency_p90_ms: float | None  # a percentile is null where too few calls were timed to state it
    latency_p95_ms: NotRequired[float | None]
    latency_p99_ms: float | None
    latency_n: int | None  # timed calls
    latency_quiet: NotRequired[bool | None]  # whether the machine was idle before each round
    threads: NotRequired[int | None]  # of one inference on a CPU; null: every processor
    size_mib: NotRequired[float | None]  # of the engine; absent for a device


class _OnDevice(TypedDict, total=False):
    """What a device measures beside, null where it cannot; absent for this machine."""

    # From a decoded image to its detections, one after another.
    end_to_end_p50_ms: float | None
    end_to_end_p90_ms: float | None
    end_to_end_p95_ms: float | None
    end_to_end_p99_ms: float | None
    end_to_end_n: int | None  # timed calls
    fps: float | None  # decoded images a second, several at the same time
    memory_mib: float | None  # of the process that holds the engine
    power_w: float | None  # under that load
    idle_w: float | None
    energy_mj_per_frame: float | None  # mJ of an image under that load


class MeasuredBenchRow(_Accuracy, _Latency, _OnDevice):
    """An engine, or torch, that was evaluated and timed."""

    status: Literal["ok"]


class UntimedBenchRow(_Accuracy):
    """A file that no engine here was built from: it has accuracy, but neither latency nor size."""

    status: Literal["untimed"]


class MissingBenchRow(_Subject):
    """What was asked for and not measured. A device writes every key of its other rows, as null."""

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
    """What the report adds to every bench row."""

    retention: float | None  # map50_95 / map50_95 of the gate's reference
    speed_up: float | None  # p50 latency of the baseline in FP32 on the same runtime and device / this one's
    size_ratio: float | None  # size of the baseline in FP32 on the same runtime and device / this one's
    notes: list[str]  # sentences on this row's figures


class MeasuredRow(MeasuredBenchRow, _Ratios):
    """`MeasuredBenchRow` in the report; latency_p99_ms is null below 662 timed calls."""


class UntimedRow(UntimedBenchRow, _Ratios):
    """`UntimedBenchRow` in the report."""


class MissingRow(MissingBenchRow, _Ratios):
    """`MissingBenchRow` in the report."""


Row = MeasuredRow | UntimedRow | MissingRow


class Missing(TypedDict):
    """Missing rows of one runtime for one reason."""

    runtime: str
    models: list[Model]
    precisions: list[Precision]
    reason: str
    device: str | None  # null: this machine


# The gate


class Judged(TypedDict):
    """The gate's judgement of one row."""

    id: str  # of the row
    retention: float | None
    passed: bool
    reason: str | None  # null where it passed


class Check(TypedDict):
    """What the gate asks for beside retention."""

    name: str  # "p50" (ms), "size" (MiB) or "signature"
    limit: float | Signature  # the most that is allowed; of "signature" the baseline's
    value: float | Signature | None
    passed: bool
    reason: str | None  # null where it passed


# Whether the retention reaches each share of FP32, in per cent, in which MLPerf Inference states its targets
# (https://github.com/mlcommons/inference_policies).
Tiers = TypedDict("Tiers", {"95": bool, "99": bool, "99.9": bool})


class Gate(TypedDict):
    """Whether the compressed model keeps enough of the baseline's mAP within its limits; the worst row decides."""

    min_retention: float  # least retention, 0 to 1
    max_latency_ms: float | None  # most p50 latency; null: no limit
    max_size_mib: float | None  # null: no limit
    reference: str | None  # id of the row that retention is relative to: the baseline in FP32
    judged: list[Judged]
    worst: str | None  # id of the row with the least retention
    timed: str | None  # id of the row with the least retention among those with a latency
    retention: float | None  # of the worst row
    tiers: Tiers | None  # null where there is no retention
    checks: list[Check]
    passed: bool
    reason: str | None  # null where it passed


class Verdict(TypedDict):
    """The first line of the report."""

    status: Literal["pass", "fail"]
    line: str
    row: str | None  # id of the row that decides


# The stages


class StageFigures(Interval):
    """A stage of the chain: its model, and what the stage measured."""

    stage: str  # "teacher", "baseline", "sparsify", "prune", "distill" or "qat"
    fingerprint: str  # of its artefact
    status: str  # "done"
    seconds: float  # that the stage took
    image_set: str  # as in a bench row
    parameters: int
    compute_gflops: float
    size_mib: float  # of its checkpoint
    map50_95: float | None
    map50: float | None
    epochs: int | None
    trained_on: NotRequired[str]  # of a distillation without labels: a phrase on its images
    # Of prune alone:
    map50_95_after_cut: NotRequired[float | None]
    map50_95_after_bn: NotRequired[float | None]  # after re-estimating BatchNorm, before any training
    kept_flops: NotRequired[float]  # FLOPs after / before
    latency_target_ms: NotRequired[float]
    latency_measured_ms: NotRequired[float]
    latency_runtime: NotRequired[str]  # that the target is for
    # Of the baseline and of the compressed float model: their torch row of the bench.
    latency_p50_ms: NotRequired[float | None]
    latency_p90_ms: NotRequired[float | None]
    latency_p99_ms: NotRequired[float | None]


class ChainStage(StageFigures):
    """A stage as the report shows it."""

    delta_map50_95: float | None  # map50_95 minus the baseline's; null for the baseline and the teacher


class Gammas(TypedDict):
    """Histograms of the absolute BatchNorm gammas while `sparsify` trains."""

    edges: list[float]  # of the bins, one more than bins
    epochs: list[list[int]]  # counts by bin, a list an epoch; the first is before training


class SensitivityFile(TypedDict):
    """What pruning measured of one channel group at a time."""

    measure: Measure
    dense: float  # the measure of the model before pruning
    ratios: list[float]  # shares of the group's channels removed, ascending
    groups: dict[str, list[float | None]]  # group -> the measure at each ratio
    caps: dict[str, float | None]  # group -> the largest share that pruning may remove; null: no limit
    images: int  # that it was measured on


class SensitiveGroup(TypedDict):
    group: str
    mean_change: float | None  # of the measure, over the ratios; null where one of them is not a number


class Sensitivity(SensitivityFile):
    most_sensitive: list[SensitiveGroup]  # at most 5, the worst first


# A key of the file is called `float`, which a class body would take for the type from there on.
_InFloat = TypedDict("_InFloat", {"float": float})  # noqa: UP013


class QuantisationFile(_InFloat):
    """What `qat.sensitivity` measured of one group of tensors at a time. `float` is the measure of the float model."""

    measure: Measure
    int8: float  # the measure of the INT8 model
    worst: float  # the least mAP, or the largest loss, that is asked for
    then: float  # the measure with the groups of `left` in float
    left: list[str]  # groups that stay in float
    images: int  # calibration images that it was measured on
    groups: dict[str, float]  # group -> the measure with that group alone in float
    price: str  # "gflops", or the runtime whose ms are the price
    compute_gflops: dict[str, float]  # group -> GFLOPs of its convolutions
    price_ms: NotRequired[
        dict[str, float]
    ]  # group -> ms that it takes longer in float; absent where the price is GFLOPs
    layer_ms: NotRequired[dict[str, list[float]]]  # convolution -> ms in float and in INT8; absent as `price_ms` is


class Quantisation(QuantisationFile):
    gives_back: dict[str, float]  # group -> rise of mAP or fall of the loss with that group alone in float


class Tensor(TypedDict):
    """A row of `placement.csv`: a tensor between two layers in the INT8 graph."""

    tensor: str
    precision: str  # "int8" or "float"
    group: str  # tensors of a group share their scale
    why: str  # the reason of its precision


# Error types


class ErrorSum(TypedDict):
    count: int
    cost: float  # rise of AP50 if these errors were mended


class ErrorType(ErrorSum):
    name: str  # one of `evaluate.tide.TYPES`


class ModelErrors(TypedDict):
    """What `evaluate.tide.errors` finds in one model's detections."""

    ap50: float  # mean over the classes with objects
    truths: int  # objects
    detections: int
    types: list[ErrorType]
    false_positives: ErrorSum
    false_negatives: ErrorSum


class ErrorTypes(TypedDict):
    """TIDE's error types of the baseline (a) and of the compressed model (b)."""

    conf: float
    a: ModelErrors  # over all detections
    b: ModelErrors
    shown_a: ModelErrors  # over detections with a score above conf
    shown_b: ModelErrors


# Other machines


class Device(TypedDict):
    """A robot whose `device.json` was added."""

    name: str  # as in its rows
    file: str  # name of the file
    about: dict[str, Json]  # board, processor, power mode and clocks, as far as it could read them
    runtime: str | None  # of its first row
    library: str | None  # version of that
    libraries: dict[str, Json] | None  # runtime -> version
    power_from: str | None  # the meter of power_w
    bundle: dict[str, Json]  # name, version and digests of the bundle that it ran
    golden: dict[str, Json] | None  # the self-test on golden images, over all engines


class Reference(TypedDict):
    """The baseline of another recipe, from its `report.json`, measured on this machine over the same images."""

    id: str
    name: str  # of the recipe
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
    """The dataset; null where the report does not know."""

    yaml: str | None  # file name
    names: list[str]  # class names in the order of their index
    train_images: int | None
    val_images: int | None
    skipped: list[str]  # findings on images that were left out
    notes: list[str]
    digest: str | None  # of the whole dataset


class Data(DataFacts):
    image_set: str | None  # of every mAP in the report


class Reproduce(TypedDict):
    recipe_yaml: str | None  # text of the recipe
    command: str | None


class Environment(TypedDict, total=False):
    """What a repetition needs; what was not recorded is absent and named in `not_recorded`."""

    commit: str
    device: dict[str, Json]  # `runtime.measure.device.device_state`
    versions: dict[str, str | None]  # library -> version
    imgsz_px: list[int]  # [height, width]
    batch: int  # images of one inference
    warm_up: str
    latency: str  # how it was taken
    seed: int
    report_made_with: str | None  # version of yolo-compress


class Document(TypedDict):
    """`report.json`. The HTML, Markdown and terminal forms are drawn from it and from nothing else."""

    schema: int  # SCHEMA
    recipe: str  # name
    verdict: Verdict
    gate: Gate
    rows: list[Row]  # by device, runtime, model and precision
    missing: list[Missing]
    data: Data
    chain: list[ChainStage]  # in the order of work
    not_tested: list[str]  # sentences on what the reader should not assume
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
    latency_quantiles: dict[str, list[float]] | None  # row id -> ms within which 0, 1, ..., 100 % of its calls are done
    quantisation: Quantisation | None
    placement: list[Tensor]
    devices: list[Device]
    references: list[Reference]
    reproduce: Reproduce
    environment: Environment
