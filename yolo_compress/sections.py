"""The sections of a recipe: every knob of the chain, typed, limited and documented here, once.

Every knob of a stage has a default, so that `distill: {}` is a section; only `data.yaml` must be given.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from .knobs import (
    TEXT,
    Batch,
    CalibImages,
    CalibratorKnob,
    CloseMosaic,
    Cosine,
    Criterion,
    Epochs,
    FeatureLoss,
    Lr0,
    Model,
    Mosaic,
    Optimizer,
    Percentile,
    Precision,
    Pretrained,
    Runtime,
    SomeEpochs,
    SourceLr0,
    SourceOptimizer,
    Threads,
    WarmupEpochs,
    Weights,
    device_value,
    imgsz_value,
    knob,
    runtimes_value,
    several,
)


class Section(BaseModel):
    """Base of all sections: frozen, strict types, no unknown keys, no NaN or infinity."""

    # defer_build: schemas are made when a recipe is read, not when the package is imported
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class DataConfig(Section):
    """The images, their labels and their size."""

    yaml: Annotated[str, knob("data yaml: as given, in datasets/, in YOLO_COMPRESS_DATA, or shipped", pattern=TEXT)]
    imgsz: Annotated[
        int | tuple[int, int],
        BeforeValidator(imgsz_value),
        knob(
            "network input in pixels, a square side or height,width",
            "one side or height,width, multiples of 32 from 32 to 4096",
        ),
    ] = 640
    on_bad: Annotated[Literal["error", "skip"], knob("at a bad image or label: stop, or drop it for every model")] = (
        "error"
    )
    allow_overlap: Annotated[bool, knob("accept images that stand in both train and val")] = False
    limit_train: Annotated[int | None, knob("use only the first n training images", ge=1)] = None
    limit_val: Annotated[int | None, knob("use only the first n validation images", ge=1)] = None

    @property
    def imgsz_hw(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.imgsz if isinstance(self.imgsz, tuple) else (self.imgsz, self.imgsz)


class RunConfig(Section):
    """The machine. Only `seed` changes results, so only it belongs in a fingerprint."""

    MACHINE: ClassVar[frozenset[str]] = frozenset({"device", "workers", "threads", "val_every"})

    device: Annotated[
        str, BeforeValidator(device_value), knob("where torch computes", "cpu or CUDA indices, as in 0 or 0,1")
    ] = "cpu"
    workers: Annotated[int, knob("processes that load images; 0: none, the reproducible way", ge=0, le=256)] = 0
    seed: Annotated[int, knob("seed of every generator", ge=0, le=2**32 - 1)] = 0
    threads: Annotated[int | None, knob("threads of torch; null: its own choice", ge=1, le=1024)] = None
    val_every: Annotated[int, knob("epochs between validations while training, for the curve in results.csv; 0: the last "
                                    "epoch only. Changes no weights", ge=0, le=100_000)] = 10  # fmt: skip


class TrainConfig(Section):
    """One training call. Defaults suit the fine-tuning of a finished net; stages override some."""

    epochs: Epochs = 10
    batch: Batch = 16
    optimizer: Optimizer = "AdamW"
    lr0: Lr0 = 1e-3
    lrf: Annotated[float, knob("learning rate of the last epoch as a fraction of lr0", ge=0, le=1)] = 0.01
    momentum: Annotated[float, knob("momentum of SGD, beta1 of Adam and AdamW", ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, knob("weight decay; not on biases and BatchNorm", ge=0, le=1)] = 5e-4
    warmup_epochs: WarmupEpochs = 1.0
    cosine: Cosine = True
    mosaic: Mosaic = 1.0
    close_mosaic: CloseMosaic = 2
    scale: Annotated[float, knob("random zoom: factor from 1-scale to 1+scale", ge=0, lt=1)] = 0.5
    translate: Annotated[float, knob("random shift as a fraction of the image", ge=0, le=1)] = 0.1
    fliplr: Annotated[float, knob("probability of a left-right flip; 0 where left and right differ", ge=0, le=1)] = 0.5
    flipud: Annotated[float, knob("probability of an upside-down flip", ge=0, le=1)] = 0.0
    amp: Annotated[
        bool,
        knob(
            "mixed precision while training: half on CUDA, bfloat16 on a CPU with AMX, where it is fast; no effect on others"
        ),
    ] = True


class SourceConfig(TrainConfig):
    """The teacher and the baseline: a finished detector (`weights`), or one trained from a checkpoint of any classes
    (`pretrained`) or from scratch (`model`). Exactly one of the three is given; training is as Ultralytics' own.
    """

    weights: Weights = None
    pretrained: Pretrained = None
    model: Model = None
    detection_part: Annotated[
        bool, knob("take the detection part of a segmentation, pose or oriented-box checkpoint; for pretrained only")
    ] = False
    freeze: Annotated[
        int,
        knob("first layers (`model.0`, ...) that keep the checkpoint's tensors, 10 is the backbone; for pretrained only",
             ge=0, le=21),
    ] = 0  # fmt: skip
    epochs: Epochs = 100
    optimizer: SourceOptimizer = "auto"  # type: ignore[assignment]  # a wider choice than that of fine-tuning
    lr0: SourceLr0 = "auto"  # type: ignore[assignment]
    warmup_epochs: WarmupEpochs = 3.0
    cosine: Cosine = False
    close_mosaic: CloseMosaic = 10

    ORIGINS: ClassVar[tuple[str, ...]] = ("weights", "pretrained", "model")

    @property
    def origin(self) -> str:
        """Which of `ORIGINS` is given."""
        return next(name for name in self.ORIGINS if getattr(self, name) is not None)

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that is read, if one is."""
        return self.weights or self.pretrained


class SparsifyConfig(TrainConfig):
    """Sparse training: a penalty on prunable channels, so that those that carry little show themselves."""

    penalty: Annotated[
        Literal["l1", "polarization", "group_lasso"],
        knob(
            "l1: all gammas (Network Slimming, arXiv 1708.06519); polarization: those under the mean of their group, so that "
            "the strong stay (after Zhuang et al., NeurIPS 2020); group_lasso: all weights that leave with a channel, "
            "as one norm (DepGraph, arXiv 2301.12900)"
        ),
    ] = "polarization"
    l1: Annotated[
        float, knob("lambda, the weight of the penalty in the loss, which is summed over a batch", gt=0, le=1)
    ] = 0.1
    lambda_scale: Annotated[
        Literal["uniform", "macs"],
        knob("lambda of a group: the same for all, or in proportion to the MACs of one of its channels, mean 1"),
    ] = "uniform"
    gamma_lr_scale: Annotated[
        float,
        knob(
            "learning rate of the gammas, as a multiple of lr0. A step of Adam is no longer than the rate, so gammas "
            "near 1 hardly move in a short training; 1 for SGD and long ones",
            ge=1,
            le=1000,
        ),
    ] = 10.0
    ramp_epochs: Annotated[float, knob("epochs over which lambda rises from 0", ge=0, le=1000)] = 1.0
    epochs: SomeEpochs = 10


class PruneConfig(TrainConfig):
    """Channel pruning to a budget, or zeros in weights, then fine-tuning (`epochs: 0`: surgery only)."""

    kind: Annotated[
        Literal["channel", "unstructured", "two_four"],
        knob(
            "channel: narrower layers, faster anywhere; unstructured: zeros; two_four: zeros that Sparse Tensor Cores skip"
        ),
    ] = "channel"
    sparsity: Annotated[
        float, knob("share of the weights that become zero, for kind=unstructured only", gt=0, lt=1)
    ] = 0.5
    criterion: Annotated[
        Criterion | Annotated[str, Field(pattern=r"\.py:\w+$")],
        knob(
            "importance of a channel group; obs: what the layers that read it lose when the others take over",
            f"one of {', '.join(get_args(Criterion))}, or file.py:function",
        ),
    ] = "obs"
    scope: Annotated[
        Literal["global", "local", "isomorphic"],
        knob("rank channels over all groups, inside each, or among groups of one shape"),
    ] = "local"
    keep_flops: Annotated[
        float | None,
        knob("budget: fraction of the convolutions' MACs that stays; 0.5 where none is given", gt=0, lt=1),
    ] = None
    keep_params: Annotated[float | None, knob("budget: fraction of the parameters that stays", gt=0, lt=1)] = None
    latency_ms: Annotated[
        float | None,
        knob("budget: milliseconds of one inference, measured on the built network and met within 5 %", gt=0, le=1e5),
    ] = None
    latency_runtime: Annotated[Runtime, knob("what latency_ms is measured on")] = "onnxruntime"
    latency_precision: Annotated[Literal["fp32", "fp16"], knob("of the network that latency_ms is measured on")] = (
        "fp32"
    )
    latency_table: Annotated[
        str | None,
        knob(
            "layer times from another machine (`yolo-compress probe`); latency_ms is then met by this table",
            pattern=TEXT,
        ),
    ] = None
    sensitivity: Annotated[
        Literal["off", "loss", "map50_95"],
        knob(
            "measure what each group's channels are worth, alone; caps what each may lose. loss: about two epochs' time"
        ),
    ] = "off"
    max_drop: Annotated[
        float,
        knob("sensitivity: a group may lose channels until the loss rises, or mAP falls, by this share", gt=0, le=10),
    ] = 0.1
    rounds: Annotated[
        int, knob("cuts on the way to the budget, fine-tuned in between; they share the epochs", ge=1, le=100)
    ] = 1
    round_to: Annotated[
        Literal[1, 2, 4, 8, 16, 32, 64],
        knob("widths are multiples of this: AVX-512 and Tensor Cores take 16 at once, AVX2 8, Tensor Cores in INT8 32"),
    ] = 16
    floor: Annotated[float, knob("fraction of its channels that every group keeps", ge=0, lt=1)] = 0.1
    reconstruct: Annotated[bool, knob("kept channels take over what removed ones said, before any training")] = True
    calib_images: Annotated[
        int, knob("training images that criteria, reconstruction and BatchNorm re-estimation look at", ge=1)
    ] = 96
    teach_from_parent: Annotated[bool, knob("the unpruned net teaches during fine-tuning")] = True
    epochs: Epochs = 40

    BUDGETS: ClassVar[tuple[str, ...]] = ("keep_flops", "keep_params", "latency_ms")
    MASKS: ClassVar[
        dict[str, frozenset[str]]
    ] = {  # kinds that make zeros, and the knobs that they read beside the shared
        "unstructured": frozenset({"sparsity", "scope"}),
        "two_four": frozenset(),
    }

    @classmethod
    def idle(cls, kind: str) -> list[str]:
        """The knobs that have no effect with this `kind`."""
        if kind == "channel":
            return ["sparsity"]
        read = {*TrainConfig.model_fields, "kind", "calib_images", "teach_from_parent", *cls.MASKS[kind]}
        return [knob for knob in cls.model_fields if knob not in read]

    @property
    def budget(self) -> tuple[str, float]:
        """The knob that sets the budget, and its value."""
        given = [(knob, getattr(self, knob)) for knob in self.BUDGETS if getattr(self, knob) is not None]
        return given[0] if given else ("keep_flops", 0.5)


class DistillConfig(TrainConfig):
    """Distillation from the teacher, or from the baseline where the recipe has no teacher."""

    teacher: Annotated[
        Literal["frozen", "mutual", "self"],
        knob(
            "frozen: the net of the section teacher, as it is; mutual: it learns along, from the labels and the student "
            "(arXiv 1706.00384); self: the student's own deep layers teach its shallow ones"
        ),
    ] = "frozen"
    images: Annotated[
        str | None,
        knob(
            "folder of images without labels: trained on instead of data.yaml's, with the teacher's word alone",
            pattern=TEXT,
        ),
    ] = None
    data_free: Annotated[
        int | None,
        knob(
            "trained on so many images inverted from the teacher's BatchNorm statistics (arXiv 1912.08795) and no others",
            ge=1,
            le=100_000,
        ),
    ] = None
    data_free_steps: Annotated[int, knob("optimizer steps of an inverted image", ge=1, le=100_000)] = 300

    temperature: Annotated[
        float,
        knob(
            "softens class scores (arXiv 1503.02531). 2 lifts a logit of -6 from 0.002 to "
            "0.05; more lets background drown the objects",
            ge=1,
            le=100,
        ),
    ] = 2.0
    alpha: Annotated[float, knob("share of soft labels in the class term, 1-alpha of hard ones", ge=0, le=1)] = 0.5
    logit_weight: Annotated[float, knob("weight of the soft-label term", ge=0, le=1000)] = 1.0
    feature_weight: Annotated[
        float,
        knob(
            "weight of the feature loss. weighted_l2 at 6, Ultralytics' `dis`, drowns the labels of a pruned student",
            ge=0,
            le=1000,
        ),
    ] = 0.3
    box_weight: Annotated[float, knob("weight of the distributions of box sides (arXiv 2102.12252)", ge=0, le=1000)] = (
        1.0
    )
    iou_weight: Annotated[
        float, knob("weight of 1 - IoU of the decoded boxes; PP-YOLOE takes 2.5 beside 1.0 and 0.5", ge=0, le=1000)
    ] = 0.0
    feature_loss: Annotated[
        FeatureLoss,
        knob(
            "what feature_weight weighs. weighted_l2: Ultralytics'; fitnet: L2 (arXiv 1412.6550); cwd: 2011.13256; pkd: "
            "2207.02039; mgd: 2205.01529; attention: 1612.03928; relation: Gram matrix over a batch, 1907.09682"
        ),
    ] = "weighted_l2"
    layers: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[\w.]+(=[\w.]+)?$")], ...] | None,
        BeforeValidator(several),
        knob(
            "layers that feature_loss compares; null: the maps that enter Detect, or for teacher=self the backbone's "
            "against these",
            "null or a list of module names, STUDENT=TEACHER where they differ, as in model.15,model.18=model.21",
        ),
    ] = None
    ramp_epochs: Annotated[float, knob("epochs over which all weights rise from 0", ge=0, le=1000)] = 0.0
    off_without_mosaic: Annotated[bool, knob("the last close_mosaic epochs see the labels alone")] = False
    epochs: SomeEpochs = 20

    WEIGHTS: ClassVar[tuple[str, ...]] = ("logit_weight", "feature_weight", "box_weight", "iou_weight")

    @classmethod
    def idle(cls, teacher: str) -> list[str]:
        """The knobs that have no effect with this `teacher`."""
        head = ["temperature", "alpha", "logit_weight", "box_weight", "iou_weight"]
        unlabelled = ["images", "data_free"]
        return {"mutual": unlabelled, "self": [*head, *unlabelled]}.get(teacher, [])

    @property
    def labelled(self) -> bool:
        """Whether the training images come with labels."""
        return self.images is None and self.data_free is None


class QatConfig(TrainConfig):
    """Calibration, then quantisation-aware training (`epochs: 0`: calibration only, PTQ)."""

    calib_images: CalibImages = 128
    calibrator: CalibratorKnob = "mse"
    percentile: Percentile = 99.99
    weight_bits: Annotated[Literal[7, 8], knob("bits of INT8 weights while training: 8 for TensorRT; 7 for the forms for "
                           "CPUs, which hold 7-bit weights because 8-bit ones saturate without VNNI")] = 8  # fmt: skip
    sensitivity: Annotated[
        Literal["off", "loss", "map50_95"],
        knob(
            "measure each group of tensors in float alone, on the calibration images, and leave as few in float as max_drop asks"
        ),
    ] = "off"
    max_drop: Annotated[
        float,
        knob(
            "sensitivity: share of the float net's value that the loss may rise by, or mAP fall by, before training",
            gt=0,
            le=10,
        ),
    ] = 0.01
    sensitivity_price: Annotated[
        Literal["gflops", "onnxruntime", "openvino"],
        knob(
            "sensitivity: what a group in float costs. gflops of its convolutions, the same on every machine; or the "
            "milliseconds that they lose against INT8, measured here on that runtime"
        ),
    ] = "gflops"
    float_groups: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[\w.]+$")], ...] | None,
        BeforeValidator(several),
        knob(
            "groups of tensors to leave in float, as placement.csv names them",
            "null or a list of names, as in model.2.cv1,model.4.cv2",
        ),
    ] = None
    learned_scales: Annotated[bool, knob("train the ranges with the weights (LSQ, arXiv 1902.08153)")] = False
    teach_from_parent: Annotated[bool, knob("the float net teaches during training")] = True
    epochs: Epochs = 3
    lr0: Lr0 = 1e-4
    warmup_epochs: WarmupEpochs = 0.0
    mosaic: Mosaic = 0.0
    close_mosaic: CloseMosaic = 0


class ExportConfig(Section):
    """ONNX and TorchScript files. The calibration here is that of the original net's PTQ."""

    precisions: Annotated[
        tuple[Precision, ...], BeforeValidator(several), knob("ONNX files to write", "a list of fp32, fp16, int8")
    ] = ("fp32", "fp16", "int8")
    opset: Annotated[int, knob("ONNX opset; per-channel Q/DQ needs 13", ge=13, le=20)] = 17
    batch: Annotated[int, knob("images an inference", ge=1, le=4096)] = 1
    dynamic_batch: Annotated[bool, knob("leave the batch size open")] = False
    simplify: Annotated[bool, knob("run onnxsim, then compare with torch again")] = True
    torchscript: Annotated[
        bool, knob("write TorchScript too; with int8 among the precisions also int8.torchscript, for torch on a CPU")
    ] = True
    nms: Annotated[
        bool,
        knob(
            "write each ONNX file again as NAME-nms.onnx, with NMS behind it: boxes of 0.25 and more, IoU 0.7, at most 300"
        ),
    ] = False
    calibration_cache: Annotated[
        bool,
        knob("also write int8-implicit.onnx and int8-implicit.cache, the same scales for TensorRT 8 and 10 without Q/DQ and "
              "for the DLA; never run on a device"),
    ] = False  # fmt: skip
    calib_images: CalibImages = 128
    calibrator: CalibratorKnob = "mse"
    percentile: Percentile = 99.99


class EngineConfig(Section):
    """Engines built from the ONNX files, one a runtime and precision."""

    runtimes: Annotated[
        Literal["auto"] | tuple[Runtime, ...],
        BeforeValidator(runtimes_value),
        knob(
            "runtimes to build for; auto: every one that imports here",
            "auto or a list of onnxruntime, openvino, tensorrt",
        ),
    ] = "auto"
    workspace_mib: Annotated[int, knob("memory TensorRT may use while building", ge=16, le=1 << 20)] = 2048


class BenchConfig(Section):
    """Accuracy, latency and size of every engine."""

    warmup: Annotated[int, knob("inferences an engine before the clock starts, each round", ge=0, le=1_000_000)] = 50
    iterations: Annotated[int, knob("timed inferences an engine in all; p99 needs 662", ge=1, le=10_000_000)] = 700
    rounds: Annotated[int, knob("turns in which engines alternate; they share the iterations", ge=1, le=1000)] = 3
    threads: Threads = None


class ReportConfig(Section):
    """The report and its gate."""

    min_retention: Annotated[float, knob("gate: mAP50-95 kept of the baseline's, else exit 1", ge=0, le=1)] = 0.98
    max_latency_ms: Annotated[
        float | None, knob("gate: p50 of one inference of the row that decides; null: none", gt=0, le=1e6)
    ] = None
    max_size_mib: Annotated[float | None, knob("gate: file of the row that decides; null: none", gt=0, le=1e6)] = None
    ab_margin: Annotated[
        float, knob("A/B: share of the original's mAP50-95 that may be lost for `pass`", ge=0, le=1)
    ] = 0.01
    ab_replicates: Annotated[
        int, knob("A/B: resamples of the images behind every interval; 0 leaves it out", ge=0, le=100_000)
    ] = 1000
    conf: Annotated[float, knob("A/B: score that a detection must exceed in use", ge=0, le=1)] = 0.25
    images: Annotated[
        int, knob("validation images shown of each kind: worst losses, new false positives, random", ge=0, le=1000)
    ] = 12
