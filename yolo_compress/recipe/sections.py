"""The sections of a recipe: type, limits, default and help of every knob.

Every knob of a stage has a default, so `distill: {}` is a complete section. Only `data.yaml` is required.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..runtime.registry import INT8_IMAGES, Precision, with_option
from .choices import CRITERIA, FEATURE_LOSSES, allowed, described
from .knob_types import (
    TEXT,
    Auto,
    Batch,
    CalibImages,
    CalibratorKnob,
    CloseMosaic,
    ControlNet,
    Cosine,
    Criterion,
    Epochs,
    FeatureLoss,
    FloatCost,
    Lr0,
    Model,
    Mosaic,
    Optimizer,
    OwnFunction,
    Percentile,
    Pretrained,
    Runtime,
    SomeEpochs,
    SourceLr0,
    SourceOptimizer,
    Threads,
    TimedRuntime,
    WarmupEpochs,
    Weights,
    as_numbers,
    as_range,
    as_tuple,
    auto_or_tuple,
    device_value,
    imgsz_value,
    knob,
)


# Packed by hand: a few lines a knob instead of a dozen.
# fmt: off
class Section(BaseModel):
    """Base class of all sections of a recipe: frozen, with strict types, without unknown keys, NaN or infinity."""

    # defer_build: pydantic builds the schemas when a recipe is read, not when the package is imported
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class DataConfig(Section):
    """The images, their labels and the size of the model's input."""

    yaml: Annotated[str, knob(
        "Data set file (YAML) with the folders of the images and the class names. Its path is tried as given, then in "
        "datasets/, then in the folders of YOLO_COMPRESS_DATA, then among the shipped files.",
        when="Give the file of your own data set.",
        group="Data", pattern=TEXT)]
    imgsz: Annotated[int | tuple[int, int], BeforeValidator(imgsz_value), knob(
        "Size of the model's input: a square side, or height,width.",
        when="Raise it for small objects, lower it for speed. A checkpoint works best at its training size.",
        group="Data", unit="px", allowed="one side or height,width, multiples of 32 from 32 to 4096")] = 640
    on_bad: Annotated[Literal["error", "skip"], knob(
        "What to do with an unreadable image or a wrong label. error: stop before any training. skip: leave the image "
        "out for every model.",
        when="Set skip when you cannot repair the data set.",
        group="Data")] = "error"
    allow_overlap: Annotated[bool, knob(
        "Accept validation images that are also training images.",
        when="Set true only for a good reason, because the mAP is then too high.",
        group="Data")] = False
    max_unlabelled: Annotated[float, knob(
        "Largest fraction of the training images, and of the validation images, that may lack a label file. These images "
        "count as background.",
        when="Raise it when your data set has more images without objects.",
        group="Data", unit="fraction", ge=0, le=1)] = 0.3
    max_det: Annotated[int, knob(
        "Largest number of detections in an image after NMS, here and on the robot. mAP counts at most 100 detections of a "
        "class in an image, as COCO does; only with `max_det` above 300 it counts more, up to `max_det`.",
        when="Raise it when an image may hold more objects.",
        group="Data", unit="detections", ge=1, le=100_000)] = 300
    hold_back: Annotated[float, knob(
        "Fraction of the training images that no stage trains on. If the stage distill lowers the mAP on these images, the next "
        "stage uses the model from before distill. 0: no image is held back.",
        when="Set 0.05 to 0.1 with 1,000 or more training images; with fewer, each image is needed for training.",
        group="Data", unit="fraction", ge=0, le=0.5)] = 0.0
    limit_train: Annotated[int | None, knob(
        "Number of training images to use, evenly spaced in the sorted list. null: all.",
        when="Set it for a quick trial.",
        group="Data", unit="images", ge=1)] = None
    limit_val: Annotated[int | None, knob(
        "Number of validation images to use, evenly spaced in the sorted list. null: all.",
        when="Set it for a quick trial; the intervals of the mAP then become wider.",
        group="Data", unit="images", ge=1)] = None

    @property
    def imgsz_hw(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.imgsz if isinstance(self.imgsz, tuple) else (self.imgsz, self.imgsz)


class RunConfig(Section):
    """Settings of the machine, and the seed. Only `seed` changes results, so only `seed` is part of a stage's fingerprint."""

    MACHINE: ClassVar[frozenset[str]] = frozenset({"device", "workers", "threads", "val_every"})

    device: Annotated[str, BeforeValidator(device_value), knob(
        "Device on which torch trains and evaluates: cpu, or the indices of CUDA GPUs.",
        when="Set 0 for the first GPU, 0,1 to train on two.",
        group="Machine", allowed="cpu or CUDA indices, as in 0 or 0,1")] = "cpu"
    workers: Annotated[int | None, knob(
        "Processes that load images for each GPU. null: one for each processor, at most 8. 0: the training process loads them "
        "itself, which is reproducible, and which a CPU always does.",
        when="Raise it when a GPU waits for images; lower it when memory is short.",
        group="Machine", unit="processes", ge=0, le=256)] = None
    seed: Annotated[int, knob(
        "Seed of all random number generators.",
        when="Change it to see how much the result varies from run to run.",
        group="Training", ge=0, le=2**32 - 1)] = 0
    threads: Annotated[int | None, knob(
        "Number of CPU threads of torch. null: torch chooses.",
        when="Lower it when other programs need the processors.",
        group="Machine", unit="threads", ge=1, le=1024)] = None
    val_every: Annotated[int, knob(
        "Number of epochs between validations. results.csv has the mAP of each validation. 0: only the last epoch is "
        "validated. Validation does not change the weights.",
        when="Lower it for a finer curve; raise it when validation takes too long.",
        group="Training", unit="epochs", ge=0, le=100_000)] = 10


class TrainConfig(Section):
    """Settings of one training. The defaults suit the fine-tuning of a trained model. Sections of stages have some other defaults."""

    epochs: Epochs = 10
    batch: Batch = 16
    optimizer: Optimizer = "AdamW"
    lr0: Lr0 = 1e-3
    lrf: Annotated[float, knob(
        "Learning rate of the last epoch, as a fraction of `lr0`.",
        when="Raise it, for example to 0.1, when the loss still falls quickly at the end of the training.",
        group="Advanced", unit="fraction", ge=0, le=1)] = 0.01
    momentum: Annotated[float, knob(
        "Momentum of SGD, or beta1 of Adam and AdamW.",
        when="With optimizer=SGD, set 0.937, the value of Ultralytics.",
        group="Advanced", unit="fraction", ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, knob(
        "Weight decay of the optimizer. It does not apply to biases and BatchNorm.",
        when="Raise it when the validation mAP falls while the training loss still falls.",
        group="Advanced", unit="factor", ge=0, le=1)] = 5e-4
    warmup_epochs: WarmupEpochs = 1.0
    cosine: Cosine = True
    mosaic: Mosaic = 1.0
    close_mosaic: CloseMosaic = 2
    scale: Annotated[float, knob(
        "Random zoom of training images. The factor lies between 1 - `scale` and 1 + `scale`.",
        when="Lower it when objects always have the same size, as above a conveyor belt.",
        group="Advanced", unit="fraction", ge=0, lt=1)] = 0.5
    translate: Annotated[float, knob(
        "Random shift of training images, by at most this fraction of their size.",
        when="Lower it when objects are cut off at the border too often.",
        group="Advanced", unit="fraction", ge=0, le=1)] = 0.1
    fliplr: Annotated[float, knob(
        "Probability that a training image is flipped left to right.",
        when="Set 0 when left and right differ, as in digits, text and traffic signs.",
        group="Training", unit="fraction", ge=0, le=1)] = 0.5
    flipud: Annotated[float, knob(
        "Probability that a training image is flipped upside down.",
        when="Set 0.5 when images have no up and down, as under a microscope or from the air.",
        group="Training", unit="fraction", ge=0, le=1)] = 0.0
    amp: Annotated[bool, knob(
        "Train in mixed precision: float16 on CUDA, bfloat16 on a CPU with AMX or AVX512_BF16. It has no effect on other "
        "CPUs. In the stage qat, it has no effect on any CPU.",
        when="Set false when the loss becomes NaN.",
        group="Advanced")] = True


class SourceConfig(TrainConfig):
    """Source of the baseline or the teacher. Set exactly one of `weights`, `pretrained` and `model`.

    `weights` is a finished detector. With `pretrained`, the training starts from a checkpoint, which may have other classes.
    With `model`, it starts from random weights. The training has the defaults of Ultralytics.
    """

    weights: Weights = None
    pretrained: Pretrained = None
    model: Model = None
    detection_part: Annotated[bool, knob(
        "Start from the detection part of a segmentation, pose or oriented-box checkpoint. Used only if `pretrained` is "
        "set.",
        when="Set true when there is no checkpoint of a detector to start from.",
        group="Model")] = False
    freeze: Annotated[int, knob(
        "Number of layers, from the first on, that are not trained. 10: the backbone. 0: all layers are trained. Used only if "
        "`pretrained` is set.",
        when="Set 10 when there are very few images, or when training takes too long.",
        group="Model", unit="layers", ge=0, le=21)] = 0
    epochs: Epochs = 100
    optimizer: SourceOptimizer = "auto"  # type: ignore[assignment]  # allows more values than fine-tuning
    lr0: SourceLr0 = "auto"  # type: ignore[assignment]
    warmup_epochs: WarmupEpochs = 3.0
    cosine: Cosine = False
    close_mosaic: CloseMosaic = 10

    ORIGINS: ClassVar[tuple[str, ...]] = ("weights", "pretrained", "model")

    @property
    def origin(self) -> str:
        """Name of the knob that is set: `weights`, `pretrained` or `model`."""
        return next(name for name in self.ORIGINS if getattr(self, name) is not None)

    @property
    def checkpoint(self) -> str | None:
        """File of the checkpoint to start from. None: training starts from random weights."""
        return self.weights or self.pretrained


class SparsifyConfig(TrainConfig):
    """Sparse training: a penalty in the loss makes unimportant channels small, so that they can be pruned."""

    penalty: Annotated[Literal["l1", "polarization", "group_lasso"], knob(
        "What the penalty makes small. l1: all gammas, the scale factors of BatchNorm (Network Slimming, arXiv 1708.06519). "
        "polarization: the gammas below the mean of their channel group, so that large gammas stay large (after Zhuang et al., "
        "NeurIPS 2020). A channel group is all channels that have to be removed together. group_lasso: the norm of all weights "
        "that are removed together with a channel (DepGraph, arXiv 2301.12900).",
        when="Set l1 for long trainings with SGD; in short ones it lowers all gammas alike.",
        group="Penalty")] = "polarization"
    l1: Annotated[float, knob(
        "Weight of the penalty in the loss. The loss is a sum over the images of a batch.",
        when="Lower it when mAP falls too far; raise it when too few gammas become small.",
        group="Penalty", unit="factor", gt=0, le=1)] = 0.1
    lambda_scale: Annotated[Literal["uniform", "macs"], knob(
        "Factor on the weight of the penalty for each channel group. uniform: 1 for all groups. macs: proportional to the "
        "multiply-accumulates (MACs) of one channel of the group; the mean over the groups is 1.",
        when="Set macs when compute matters more than the number of parameters.",
        group="Advanced")] = "uniform"
    gamma_lr_scale: Annotated[float, knob(
        "Learning rate of the BatchNorm gammas, as a multiple of `lr0`. In one step, Adam changes a weight by about the "
        "learning rate. With 1, a short training therefore hardly changes the gammas.",
        when="Set 1 for SGD and for long trainings.",
        group="Advanced", unit="factor", ge=1, le=1000)] = 10.0
    ramp_epochs: Annotated[float, knob(
        "Number of epochs at the start of the training over which the weight of the penalty rises to `l1`. 0: it is constant.",
        when="Raise it when the loss jumps in the first epochs.",
        group="Advanced", unit="epochs", ge=0, le=1000)] = 1.0
    epochs: SomeEpochs = 10


class PruneConfig(TrainConfig):
    """Remove channels or factorise convolutions to meet a budget, or set weights to 0. Then fine-tune, unless `epochs` is 0."""

    kind: Annotated[Literal["channel", "low_rank", "unstructured", "two_four"], knob(
        "What is removed. channel: whole channels. Layers become narrower, and faster on every runtime. low_rank: convolutions "
        "become two or three smaller ones; layers keep their channels. unstructured: single weights become 0. two_four: 2 of "
        "every 4 weights become 0, which Sparse Tensor Cores skip.",
        when="Try low_rank with `latency_ms`; the kinds with zeros only when the runtime gains from zeros.",
        group="Criterion")] = "channel"
    then: Annotated[Literal["off", "low_rank"], knob(
        "What follows the removal of channels, before fine-tuning. low_rank: convolutions are factorised, until the budget is "
        "met. off: channels alone meet the budget.",
        when="Try low_rank when channels alone cost too much mAP.",
        group="Criterion")] = "off"
    then_share: Annotated[float, knob(
        "Share of the reduction that `then` makes. Equal shares reduce the cost by the same factor: with `keep_flops` 0.25 and a "
        "share of 0.5, channels keep 0.5 of the MACs, and the factors 0.5 of those. Used only if `then` is low_rank.",
        when="Raise it when channels lose too much; lower it when the factors do.",
        group="Advanced", unit="fraction", gt=0, lt=1)] = 0.3
    sparsity: Annotated[float, knob(
        "Fraction of the weights that become 0. Used only if `kind` is unstructured.",
        when="Raise it until mAP falls too far.",
        group="Advanced", unit="fraction", gt=0, lt=1)] = 0.5
    criterion: Annotated[Criterion | OwnFunction, knob(
        f"How the importance of a channel is computed. The least important channels are removed. {described(CRITERIA)}",
        when="Set bn_gamma if sparsify.penalty is l1 or polarization.",
        group="Criterion", allowed=allowed(CRITERIA))] = "obs"
    scope: Annotated[Literal["global", "local", "isomorphic"], knob(
        "Which channels are ranked together. local: those of one channel group (channels that have to be removed together). "
        "global: those of all groups. isomorphic: those of all groups with the same structure (arXiv 2407.04616).",
        when="Try global or isomorphic when you want some layers to lose more channels than others.",
        group="Advanced")] = "local"
    keep_flops: Annotated[float | None, knob(
        "Budget: fraction of the multiply-accumulates (MACs) that remains, over all convolutions. If no budget is set, "
        "`keep_flops` is 0.5.",
        when="Lower it for more speed, raise it for more mAP.",
        group="Budget", unit="fraction", gt=0, lt=1)] = None
    keep_params: Annotated[float | None, knob(
        "Budget: fraction of the parameters that remains.",
        when="Set it instead of `keep_flops` when file size or memory is the limit.",
        group="Budget", unit="fraction", gt=0, lt=1)] = None
    latency_ms: Annotated[float | None, knob(
        "Budget: latency of one inference. Pruned models are built and timed on this machine, until the latency of one is "
        "within 5 % of this value.",
        when="Set it instead of `keep_flops` when you know the time that an image may take.",
        group="Budget", unit="ms", gt=0, le=1e5)] = None
    latency_runtime: Annotated[TimedRuntime, knob(
        "Runtime on which the latency for `latency_ms` is measured.",
        when="If you set `latency_ms`, set the runtime of the robot.",
        group="Budget")] = "onnxruntime"
    latency_precision: Annotated[Precision, knob(
        "Precision of the model that is timed for `latency_ms`.",
        when="If you set `latency_ms`, set the precision that will run on the robot, such as int8.",
        group="Advanced")] = "fp32"
    latency_table: Annotated[str | None, knob(
        "File with layer times from another machine, measured with the models of `yolo-compress probe`. `latency_ms` then "
        "refers to these times, and nothing is timed here.",
        when="Set it when the robot is another machine than this one.",
        group="Budget", pattern=TEXT)] = None
    sensitivity: Annotated[Literal["off", "loss", "map50_95"], knob(
        "Before pruning, cut one channel group at a time, and measure how far the loss rises (loss) or mAP falls (map50_95). "
        "`max_drop` then limits how many channels each group may lose. The measurement of the loss takes about as long as two "
        "epochs. off: measure nothing.",
        when="Set loss when mAP after pruning is too low.",
        group="Criterion")] = "off"
    max_drop: Annotated[float, knob(
        "How far the loss may rise, or mAP may fall, when channels are removed from one channel group, as a fraction of the value "
        "before pruning. Used only if `sensitivity` is on.",
        when="Lower it to protect sensitive layers; raise it when the budget cannot be reached.",
        group="Criterion", unit="fraction", gt=0, le=10)] = 0.1
    rounds: Annotated[int, knob(
        "Number of pruning steps until the budget is met. Fine-tuning follows each step. The epochs are divided among the steps.",
        when="Raise it (2 to 4) when much is removed and there are many epochs.",
        group="Training", unit="rounds", ge=1, le=100)] = 1
    round_to: Annotated[Literal[1, 2, 4, 8, 16, 32, 64], knob(
        "Channel counts, and the ranks of factors, become multiples of this number. AVX2 processes 8 channels at once, AVX-512 "
        "and Tensor Cores 16, and Tensor Cores in INT8 32.",
        when="Set 8 for small models and CPUs with AVX2, 32 for INT8 on a GPU.",
        group="Budget", unit="channels")] = 16
    depth: Annotated[bool, knob(
        "Also remove whole bottlenecks: the last ones of the layers C2f and C3k2. A bottleneck goes if the model within the "
        "budget then has less output error than with narrower layers alone. false: only channels are removed.",
        when="Set true when the latency of single images counts and half of the FLOPs or more remain.",
        group="Budget")] = False
    floor: Annotated[float, knob(
        "Each channel group keeps at least this fraction of its channels. It does not limit how many bottlenecks `depth` removes. "
        "Between the factors of a convolution, it is the fraction of the channels on its narrower side.",
        when="Lower it when the budget cannot be reached; raise it when a layer becomes too narrow.",
        group="Advanced", unit="fraction", ge=0, lt=1)] = 0.1
    reconstruct: Annotated[bool, knob(
        "Before any training, refit the weights of the remaining channels by least squares, so that they compensate for the "
        "removed channels (arXiv 1707.06168). For low rank, refit the last factor of each convolution.",
        when="Set false only to measure what this step gains.",
        group="Advanced")] = True
    calib_images: Annotated[int, knob(
        "Number of training images. They are used to compute the importance of channels (`criterion`), to refit weights "
        "(`reconstruct`), and to re-estimate the BatchNorm statistics.",
        when="Raise it when the scenes vary a lot. Pruning takes longer with more images.",
        group="Advanced", unit="images", ge=1)] = 96
    teach_from_parent: Annotated[bool, knob(
        "Use the model before pruning as a teacher during fine-tuning.",
        when="Set false when memory runs out, or to measure the gain from this teacher.",
        group="Training")] = True
    epochs: Epochs = 40

    BUDGETS: ClassVar[tuple[str, ...]] = ("keep_flops", "keep_params", "latency_ms")
    CHANNELS: ClassVar[frozenset[str]] = frozenset(  # knobs that only choose channels
        {"criterion", "scope", "sensitivity", "max_drop", "rounds", "depth", "then", "then_share"}
    )
    MASKS: ClassVar[dict[str, frozenset[str]]] = {  # the kinds that make zeros, each with the knobs of this section that it uses
        "unstructured": frozenset({"sparsity", "scope"}),
        "two_four": frozenset(),
    }

    @classmethod
    def idle(cls, kind: str) -> list[str]:
        """Return the names of the knobs that have no effect with this `kind`."""
        if kind == "channel":
            return ["sparsity"]
        if kind == "low_rank":
            return [knob for knob in cls.model_fields if knob == "sparsity" or knob in cls.CHANNELS]
        read = {*TrainConfig.model_fields, "kind", "calib_images", "teach_from_parent", *cls.MASKS[kind]}
        return [knob for knob in cls.model_fields if knob not in read]

    @property
    def factorises(self) -> bool:
        """Whether convolutions are factorised."""
        return self.kind == "low_rank" or self.then == "low_rank"

    @property
    def budget(self) -> tuple[str, float]:
        """(name of the knob that sets the budget, its value). If no knob sets a budget: ("keep_flops", 0.5)."""
        given = [(knob, getattr(self, knob)) for knob in self.BUDGETS if getattr(self, knob) is not None]
        return given[0] if given else ("keep_flops", 0.5)


class DistillConfig(TrainConfig):
    """Distillation from the teacher. If the recipe has no teacher, the baseline is the teacher."""

    teacher: Annotated[Literal["frozen", "mutual", "self"], knob(
        "Teacher of the student. frozen: the model of the section `teacher`, with fixed weights. mutual: the same model, but "
        "it also learns, from the labels and the student's outputs (arXiv 1706.00384). self: the student's deep layers teach "
        "its shallow layers.",
        when="Try mutual or self when there is no larger teacher.",
        group="Teacher")] = "frozen"
    images: Annotated[str | None, knob(
        "Folder of images without labels, used in place of the data set's training images. The student then learns "
        "from the teacher's outputs alone.",
        when="Set it when you have many images without labels.",
        group="Teacher", pattern=TEXT)] = None
    data_free: Annotated[int | None, knob(
        "Number of images to generate from the teacher's BatchNorm statistics (arXiv 1912.08795). They are used in "
        "place of the training images.",
        when="Set it (64) when there are no training images.",
        group="Advanced", unit="images", ge=1, le=100_000)] = None
    data_free_steps: Annotated[int, knob(
        "Number of optimizer steps for each generated image. Used only if `data_free` is set.",
        when="Raise it when the generated images look like noise.",
        group="Advanced", unit="steps", ge=1, le=100_000)] = 300

    temperature: Annotated[float, knob(
        "The class logits of teacher and student are divided by this number before they are compared (arXiv 1503.02531). "
        "Low scores then count more: with 2, a score of 0.002 becomes 0.05. Above 2, background outweighs the objects.",
        when="Set 1 when the teacher is the baseline itself.",
        group="Loss", unit="factor", ge=1, le=100)] = 2.0
    alpha: Annotated[float, knob(
        "Share of the teacher's soft labels in the class loss. The labels of the data set have the share 1 - `alpha`.",
        when="Lower it when the teacher is often wrong.",
        group="Advanced", unit="fraction", ge=0, le=1)] = 0.5
    logit_weight: Annotated[float, knob(
        "Weight of the loss between the class scores of student and teacher (soft labels). 0: no such loss.",
        when="Raise it when the teacher is much better than the student.",
        group="Loss", unit="factor", ge=0, le=1000)] = 1.0
    feature_weight: Annotated[float, knob(
        "Weight of the loss between feature maps (`feature_loss`). 0: no such loss. Ultralytics uses 6 for weighted_l2 (its "
        "setting `dis`). If the student is pruned, 6 outweighs the labels.",
        when="Change it together with `feature_loss`: about 0.2 for pkd, 80 for relation.",
        group="Loss", unit="factor", ge=0, le=1000)] = 0.3
    box_weight: Annotated[float, knob(
        "Weight of the box loss (arXiv 2102.12252). YOLOv8 and YOLO11 predict the position of each box side as a distribution. "
        "This loss compares the student's distributions with the teacher's; in YOLO26, it compares the lengths. 0: no box loss.",
        when="Raise it (3) when objects are found but their boxes do not fit well.",
        group="Loss", unit="factor", ge=0, le=1000)] = 1.0
    iou_weight: Annotated[float, knob(
        "Weight of the IoU loss, which is 1 minus the IoU between the student's box and the teacher's. 0: no IoU loss. PP-YOLOE "
        "uses 2.5, with 1.0 for the loss on classes and 0.5 for the loss on the distributions of box sides.",
        when="Set it when boxes do not fit well and `box_weight` does not help.",
        group="Advanced", unit="factor", ge=0, le=1000)] = 0.0
    feature_loss: Annotated[FeatureLoss | OwnFunction, knob(
        f"Loss between feature maps of student and teacher, weighted by `feature_weight`. {described(FEATURE_LOSSES)}",
        when="Try another one when weighted_l2 gains nothing, and change `feature_weight` with it.",
        group="Loss", allowed=allowed(FEATURE_LOSSES))] = "weighted_l2"
    layers: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[\w.]+(=[\w.]+)?$")], ...] | None, BeforeValidator(as_tuple), knob(
        "Layers that `feature_loss` compares. null: the feature maps that enter the head. If the knob `teacher` is self, null "
        "compares these maps with those of the backbone.",
        when="Set it to compare other layers, or when the teacher's layers have other names.",
        group="Advanced",
        allowed="null or a list of module names, STUDENT=TEACHER where they differ, as in model.15,model.18=model.21"
    )] = None
    ramp_epochs: Annotated[float, knob(
        "Number of epochs at the start of the training over which the weights of all distillation losses rise to their values. "
        "0: the weights are constant.",
        when="Raise it when the loss jumps in the first epochs.",
        group="Advanced", unit="epochs", ge=0, le=1000)] = 0.0
    off_without_mosaic: Annotated[bool, knob(
        "Train without the teacher, on the labels alone, in the last epochs, which have no mosaic (`close_mosaic`).",
        when="Try it when the teacher is hardly better than the student.",
        group="Advanced")] = False
    epochs: SomeEpochs = 20

    WEIGHTS: ClassVar[tuple[str, ...]] = ("logit_weight", "feature_weight", "box_weight", "iou_weight")

    @classmethod
    def idle(cls, teacher: str) -> list[str]:
        """Return the names of the knobs that have no effect with this `teacher`."""
        head = ["temperature", "alpha", "logit_weight", "box_weight", "iou_weight"]
        unlabelled = ["images", "data_free"]
        return {"mutual": unlabelled, "self": [*head, *unlabelled]}.get(teacher, [])

    @property
    def labelled(self) -> bool:
        """Whether the student trains on images with labels."""
        return self.images is None and self.data_free is None


class QatConfig(TrainConfig):
    """Calibrate INT8, then train with fake quantisation (QAT). If `epochs` is 0, only calibrate (PTQ)."""

    calib_images: CalibImages = 128
    calibrator: CalibratorKnob = "mse"
    percentile: Percentile = 99.99
    weight_bits: Annotated[Literal[7, 8], knob(
        "Bits of the INT8 weights, in training and in every file. With 8 bits, sums overflow on CPUs without VNNI.",
        when="Set 8 when the robot runs TensorRT, or when all its possible CPUs have VNNI.",
        group="Precision", unit="bits")] = 7
    sensitivity: Annotated[Literal["off", "loss", "map50_95"], knob(
        "Leave one group of tensors in float at a time, and measure the loss (loss) or mAP (map50_95) on the calibration images. "
        "The tensors of a group share one scale. Then leave those groups in float that keep the loss or mAP within `max_drop` "
        "at the least cost. off: measure nothing.",
        when="Set loss when INT8 loses too much mAP.",
        group="Precision")] = "off"
    max_drop: Annotated[float, knob(
        "How far INT8 may raise the loss, or lower mAP, before training, as a fraction of the float model's value. Used only if "
        "`sensitivity` is on.",
        when="Lower it for more mAP, raise it for more layers in INT8.",
        group="Precision", unit="fraction", gt=0, le=10)] = 0.01
    sensitivity_price: Annotated[FloatCost, knob(
        "How the cost of leaving a group of tensors in float is computed. gflops: as the GFLOPs of its convolutions, which are "
        "equal on every machine. Name of a runtime: as the time that its convolutions take longer in FP32 than in INT8, measured "
        "on this machine. Used only if `sensitivity` is on.",
        when="Set the robot's runtime when the robot's CPU is like this one.",
        group="Advanced")] = "gflops"
    float_groups: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[\w.]+$")], ...] | None, BeforeValidator(as_tuple), knob(
        "Groups of tensors that stay in float. The file placement.csv, which this stage writes, lists the names of all groups.",
        when="Set it when you know which layers lose mAP in INT8.",
        group="Advanced", allowed="null or a list of names, as in model.2.cv1,model.4.cv2")] = None
    learned_scales: Annotated[bool, knob(
        "Train the scales together with the weights (LSQ, arXiv 1902.08153).",
        when="Try it when INT8 loses mAP after a training with fixed scales.",
        group="Advanced")] = False
    teach_from_parent: Annotated[bool, knob(
        "Use the float model as a teacher during training.",
        when="Set false when memory runs out, or to measure the gain from this teacher.",
        group="Training")] = True
    epochs: Epochs = 3
    lr0: Lr0 = 1e-4
    warmup_epochs: WarmupEpochs = 0.0
    mosaic: Mosaic = 0.0
    close_mosaic: CloseMosaic = 0


class ExportConfig(Section):
    """ONNX and TorchScript files.

    The calibration knobs here are for the INT8 files of the baseline, which has no QAT. The calibration knobs for the
    compressed model are in the section `qat`.
    """

    precisions: Annotated[tuple[Precision, ...], BeforeValidator(as_tuple), knob(
        "Precisions of the ONNX files.",
        when="Leave out precisions that none of your robots uses.",
        group="Files")] = ("fp32", "fp16", "int8")
    opset: Annotated[int, knob(
        "Version of the ONNX operator set (opset) in the files. Per-channel Q/DQ needs 13 or more.",
        when="Set an opset that the robot's runtime reads; `yolo-compress lint FILE target=...` checks it.",
        group="Advanced", ge=13, le=20)] = 17
    batch: Annotated[int, knob(
        "Number of images in one inference.",
        when="Raise it when several cameras share one inference.",
        group="Files", unit="images", ge=1, le=4096)] = 1
    dynamic_batch: Annotated[bool, knob(
        "Write files that take any number of images in one inference.",
        when="Set true when the number of images changes from inference to inference.",
        group="Files")] = False
    simplify: Annotated[bool, knob(
        "Simplify the ONNX graph with onnxsim. The outputs of the simplified graph are compared with torch.",
        when="Set false when onnxsim fails.",
        group="Advanced")] = True
    torchscript: Annotated[bool, knob(
        "Also write TorchScript files. If the precisions include int8, one of them is int8.torchscript, for torch on a CPU.",
        when="Set false when none of your programs loads TorchScript.",
        group="Files")] = True
    nms: Annotated[bool, knob(
        "Write each ONNX file a second time, as NAME-nms.onnx, with non-maximum suppression (NMS) in the graph: score "
        "at least 0.25, IoU 0.7, at most 300 boxes. YOLO26 needs no NMS and refuses this.",
        when="Set true when your program has no NMS of its own.",
        group="Files")] = False
    coreml: Annotated[bool, knob(
        "Also write the folder coreml/: packages (.mlpackage) for iPhones and Macs, and a program that checks them on a Mac. "
        "They are converted here and have never run. Needs coremltools; with nms=true, packages with NMS too.",
        when="Set true for a program on iOS 17 or macOS 14, or later.",
        group="Files")] = False
    calibration_cache: Annotated[bool, knob(
        "Also write int8-implicit.onnx and int8-implicit.cache: INT8 with the same scales, but without Q/DQ nodes. TensorRT "
        "8 and 10 and the DLA can read them. These files have never run on a device.",
        when="Set true for the DLA of a Jetson Orin or Xavier.",
        group="Advanced")] = False
    calib_images: CalibImages = 128
    calibrator: CalibratorKnob = "mse"
    percentile: Percentile = 99.99


class EngineConfig(Section):
    """Engines built from the ONNX files, one for each runtime and precision."""

    runtimes: Annotated[Literal["auto"] | tuple[Runtime, ...], BeforeValidator(auto_or_tuple), knob(
        "Runtimes to build engines for. auto: every runtime that can be imported here.",
        when="Name one to save time.",
        group="Engine")] = "auto"
    workspace_mib: Annotated[int, knob(
        "Limit of the memory that TensorRT uses while it builds an engine.",
        when="Lower it when a build runs out of memory.",
        group="Engine", unit="MiB", ge=16, le=1 << 20)] = 2048
    int8_images: Annotated[bool, knob(
        "INT8 engines take images as INT8 values, with the scale and zero point of their input, in place of float32 from 0 to 1. "
        f"Only for {', '.join(with_option(INT8_IMAGES))}. The boxes are equal, and the output stays float32.",
        when="Set true when your program fills the INT8 input of a phone or accelerator itself.",
        group="Engine")] = False


class BenchConfig(Section):
    """Accuracy, latency and size of every engine."""

    warmup: Annotated[int, knob(
        "Number of inferences of each engine before its timing starts, in each round.",
        when="Raise it when the processor takes longer to reach its full clock rate.",
        group="Measurement", unit="inferences", ge=0, le=1_000_000)] = 50
    iterations: Annotated[int, knob(
        "Number of timed inferences of each engine, over all rounds. p99 needs at least 662.",
        when="Lower it for a quick look. Raise it for a p99 that varies less.",
        group="Measurement", unit="inferences", ge=1, le=10_000_000)] = 700
    rounds: Annotated[int, knob(
        "Number of rounds. Each round times every engine, one after another. The iterations are divided among the rounds.",
        when="Raise it when the speed of the machine changes over minutes.",
        group="Measurement", unit="rounds", ge=1, le=1000)] = 3
    threads: Threads = None


class ControlConfig(Section):
    """Models without the compression, trained like the compressed model: they show what each part of the chain gains.

    Each control repeats the epochs and schedules of sparsify, prune and distill.
    """

    nets: Annotated[Literal["auto"] | tuple[ControlNet, ...], BeforeValidator(auto_or_tuple), knob(
        "Controls to train. longer: the baseline, without a teacher. taught: the baseline, with the teachers of the chain. "
        "narrowed: as taught, but all layers first lose the same share of their channels, until the MACs are those of the pruned "
        "model. auto: all controls that differ from each other in this recipe.",
        when="Name one to save time.",
        group="Comparison")] = "auto"
    max_minutes: Annotated[float | None, knob(
        "Limit of the expected training time of all controls together. If they would take longer, none is trained, and the "
        "report says so. null: no limit.",
        when="Set it when the run must end by a certain time.",
        group="Comparison", unit="min", gt=0, le=1e6)] = None


class ReportConfig(Section):
    """The report and its gate.

    The gate judges the compressed engine with the lowest mAP50-95. If there are INT8 engines, it judges only these.
    """

    min_retention: Annotated[float, knob(
        "Gate: smallest retention. The retention is mAP50-95 of the compressed engine divided by mAP50-95 of the baseline "
        "in FP32. If it is below this limit, the exit code is 1.",
        when="Set it by the mAP that your use can lose. 0.98 allows a loss of 2 %.",
        group="Gate", unit="fraction", ge=0, le=1)] = 0.98
    max_latency_ms: Annotated[float | None, knob(
        "Gate: largest p50 latency of one inference of the engine that the gate judges. null: no limit.",
        when="Set it when you know the time that an image may take.",
        group="Gate", unit="ms", gt=0, le=1e6)] = None
    max_size_mib: Annotated[float | None, knob(
        "Gate: largest file size of the engine that the gate judges. null: no limit.",
        when="Set it when the robot's storage is small.",
        group="Gate", unit="MiB", gt=0, le=1e6)] = None
    ab_margin: Annotated[float, knob(
        "A/B comparison: how much mAP50-95 the compressed model may lose and still pass, as a fraction of the baseline's "
        "mAP50-95.",
        when="Raise it when the validation images are too few for a verdict.",
        group="Comparison", unit="fraction", ge=0, le=1)] = 0.01
    ab_replicates: Annotated[int, knob(
        "A/B comparison: number of bootstrap resamples of the images for each interval. 0: no A/B comparison.",
        when="Lower it when the report takes too long.",
        group="Comparison", unit="resamples", ge=0, le=100_000)] = 1000
    conf: Annotated[float, knob(
        "A/B comparison: score threshold. Only detections with a higher score count.",
        when="Set the threshold that your program uses.",
        group="Comparison", unit="fraction", ge=0, le=1)] = 0.25
    images: Annotated[int, knob(
        "Number of validation images in the report, for each of three kinds: images with the most lost objects, images with the "
        "most new false positives, and random images.",
        when="Set 0 for a small file.",
        group="Comparison", unit="images", ge=0, le=1000)] = 12


class SearchConfig(Section):
    """Search for the knobs that keep the most mAP within a latency or size.

    Only `yolo-compress search` reads this section. Each trial sets some knobs of prune, distill and qat. A range that is null is not
    searched: the recipe's value stays. auto chooses by the number of training images.
    """

    runtime: Annotated[Runtime, knob(
        "Runtime of the engines that are timed.",
        when="Set the runtime of the robot.",
        group="Goal")] = "onnxruntime"
    cost: Annotated[Literal["latency", "size"], knob(
        "What the search lowers. latency: p50 of one inference of the engine. size: MiB of the engine's files.",
        when="Set size when the robot's storage is the limit.",
        group="Goal")] = "latency"
    latency_ms: Annotated[float | None, knob(
        "Largest p50 latency of one inference of the engine, measured on this machine. null: no limit.",
        when="Set it when you know the time that an image may take.",
        group="Goal", unit="ms", gt=0, le=1e5)] = None
    size_mib: Annotated[float | None, knob(
        "Largest size of the engine's files. Used only if `cost` is size. null: no limit.",
        when="Set it together with cost=size.",
        group="Goal", unit="MiB", gt=0, le=1e6)] = None
    max_drop: Annotated[float, knob(
        "How much mAP50-95 the engine may lose, as a fraction of the baseline's. The lower end of the 95 % interval decides.",
        when="Raise it when speed matters more, or when few validation images make the interval wide.",
        group="Goal", unit="fraction", ge=0, lt=1)] = 0.01
    trials: Annotated[int, knob(
        "Largest number of trials of the study.",
        when="Raise it when the front still moves in the last trials.",
        group="Goal", unit="trials", ge=1, le=100_000)] = 40
    hours: Annotated[float | None, knob(
        "Largest time of the study, over all its runs. When it is over, the running trial is ended and not counted. null: no limit.",
        when="Set it when the machine must be free by a certain time.",
        group="Goal", unit="h", gt=0, le=1e5)] = None
    keep_flops: Annotated[Auto | tuple[float, float] | None, BeforeValidator(as_range), knob(
        "Range of `prune.keep_flops`.",
        when="Lower its start when no trial is fast enough.",
        group="Space", unit="fraction", allowed="auto, null or two numbers as in 0.3,0.8")] = "auto"
    criterion: Annotated[Auto | tuple[Criterion, ...] | None, BeforeValidator(auto_or_tuple), knob(
        "Values of `prune.criterion` to choose from.",
        when="Name those that worked on your data.",
        group="Space")] = "auto"
    round_to: Annotated[
        Auto | tuple[Literal[1, 2, 4, 8, 16, 32, 64], ...] | None, BeforeValidator(as_numbers), knob(
        "Values of `prune.round_to` to choose from.",
        when="Name those that suit the robot's processor.",
        group="Space", allowed="auto, null or a list of 1, 2, 4, 8, 16, 32, 64")] = "auto"
    prune_share: Annotated[Auto | tuple[float, float] | None, BeforeValidator(as_range), knob(
        "Range of the share of the epochs of prune and distill that prune gets. distill gets the others.",
        when="Set null to keep the recipe's epochs.",
        group="Space", unit="fraction", allowed="auto, null or two numbers as in 0.5,0.9")] = "auto"
    logit_weight: Annotated[Auto | tuple[float, float] | None, BeforeValidator(as_range), knob(
        "Range of `distill.logit_weight`.",
        when="Widen it when the best trials lie at one of its ends.",
        group="Space", unit="factor", allowed="auto, null or two numbers as in 0.5,2")] = "auto"
    feature_weight: Annotated[Auto | tuple[float, float] | None, BeforeValidator(as_range), knob(
        "Range of `distill.feature_weight`.",
        when="Change it with `distill.feature_loss`: about 0.1,0.4 for pkd.",
        group="Space", unit="factor", allowed="auto, null or two numbers as in 0.1,1")] = "auto"
    box_weight: Annotated[Auto | tuple[float, float] | None, BeforeValidator(as_range), knob(
        "Range of `distill.box_weight`.",
        when="Widen it when boxes do not fit well.",
        group="Space", unit="factor", allowed="auto, null or two numbers as in 0.5,3")] = "auto"
    precision: Annotated[tuple[Precision, ...], BeforeValidator(as_tuple), knob(
        "Precisions of the engines of each trial. They share one fine-tuned model.",
        when="Name more when you do not know which one is fastest on the robot.",
        group="Space")] = ("int8",)
    int8_max_drop: Annotated[
        Auto | tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None, BeforeValidator(as_numbers), knob(
        "Values of `qat.max_drop`, each with `qat.sensitivity=loss`. Each one makes another INT8 engine of the same model, with "
        "other groups in float. null: only the engine with all groups in INT8.",
        when="Give several (0.003,0.01) when INT8 loses much mAP.",
        group="Space", unit="fraction", allowed="auto, null or numbers as in 0.003,0.01")] = "auto"
    short: Annotated[float, knob(
        "Fraction of the epochs of the first, short fine-tuning. Trials that are worse than others after it end there.",
        when="Raise it when good trials end too early.",
        group="Advanced", unit="fraction", gt=0, lt=1)] = 0.25
    workers: Annotated[Literal["local", "ray"], knob(
        "Where trials run. local: one after another in this command, and in each `search worker`. ray: as tasks of the Ray cluster of "
        "`RAY_ADDRESS`, of the one that runs on this machine, or of a new one on this machine.",
        when="Set ray when you have a Ray cluster, or several GPUs in this machine.",
        group="Advanced")] = "local"
    storage: Annotated[str | None, knob(
        "Where Optuna keeps the study: an address of a database, such as postgresql://host/name. null: a file in the study's "
        "folder.",
        when="Set it for many workers on several machines.",
        group="Advanced", pattern=TEXT)] = None


class Sections(Section):
    """All sections of a recipe. This class checks each section by itself; `Recipe` also checks them together.

    Attributes:
        name: Name of the recipe file. The links `weights/<name>/<stage>` lead to its artefacts.
        data, run, teacher, ...: One section each. A stage whose section is None is left out.
    """

    name: str
    data: DataConfig
    run: RunConfig = RunConfig()
    teacher: SourceConfig | None = None
    baseline: SourceConfig
    sparsify: SparsifyConfig | None = None
    prune: PruneConfig | None = None
    distill: DistillConfig | None = None
    qat: QatConfig | None = None
    export: ExportConfig | None = None
    engine: EngineConfig | None = None
    bench: BenchConfig | None = None
    control: ControlConfig | None = None
    report: ReportConfig | None = None
    search: SearchConfig | None = None
