"""Types of the A/B document, schema 1. It compares model A, often the baseline, with model B. Missing figures are null."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict


class Side(TypedDict):
    """Description of one of the two models in the A/B document."""

    label: str
    row: NotRequired[str]  # id of its bench row; absent if `ab` made the document
    executed: NotRequired[str]  # the executed arithmetic, as text; present only if `ab` made the document
    imgsz: NotRequired[
        list[int]
    ]  # [height, width] of the input, px; only if `ab` made the document, and not of a cascade


class Settings(TypedDict):
    margin: float  # fraction of model A's map50_95 that model B may lose
    conf: float  # score that a detection must exceed to be shown
    replicates: int  # bootstrap resamples
    seed: int
    iou: float  # IoU from which a detection finds an object


class ABVerdict(TypedDict):
    status: Literal["pass", "fail", "inconclusive"]
    line: str
    smallest_difference: (
        float | None
    )  # smallest difference in map50_95 that these images can show; null without an interval


class Difference(TypedDict):
    """mAP of models A and B and the difference with its interval. All values are null if there are no objects."""

    a: float | None
    b: float | None
    delta: float | None  # b - a
    low: float | None  # ends of the 95 % interval of delta
    high: float | None


class Total(Difference):
    interval_a: list[float | None]  # [low, high] of a
    interval_b: list[float | None]


class Part(Difference):
    name: str  # name of a class, or "small", "medium", "large"
    truths: int  # number of objects


class Shown(TypedDict):
    """Objects found and missed by one model at the score threshold `conf`."""

    recall: float
    missed: int  # number of missed objects
    false_positives: int
    false_positives_per_image: float


class McNemar(TypedDict):
    a_only: int  # objects that only A finds
    b_only: int
    images: int  # images where the models differ
    p: float  # p value of McNemar's exact test by image


class ScoreShift(TypedDict):
    """Score of model B minus score of model A, over the detections that both models have. Null if there are none."""

    median: float | None
    p10: float | None
    p90: float | None


class Agreement(TypedDict):
    matched: int  # detections that both have
    median_iou: float | None
    p05_iou: float | None


class Operating(TypedDict):
    """Comparison of both models at the score threshold of the deployment."""

    conf: float
    a: Shown
    b: Shown
    mcnemar: McNemar
    threshold_b: float | None  # score threshold at which B has A's recall; null if there is none
    score_shift: ScoreShift
    agreement: Agreement


class Flip(TypedDict):
    """An image in which only one model finds an object, or only model B shows a false detection."""

    image: int  # index in the validation images
    lost: int  # objects that only A finds
    gained: int  # objects that only B finds
    new_false_positives: int  # false positives that only B has


class PrecisionCurves(TypedDict):
    """Precision of models A and B at IoU 0.5 for the recalls 0, 0.01, ..., 1: the mean over the classes."""

    a: list[float]
    b: list[float]


class LatencyRatio(TypedDict):
    a_p50_ms: float
    b_p50_ms: float
    ratio: float  # A / B: above 1, B is faster
    low: float | None  # ends of the 95 % interval of the ratio
    high: float | None
    a: NotRequired[Side]  # rows that were timed; absent if `ab` made the document
    b: NotRequired[Side]


class AB(TypedDict):
    """The A/B document: accuracy and latency of models A and B on the same images, their differences, and a verdict."""

    schema: int
    a: Side
    b: Side
    images: int
    image_set: str | None  # digest of the images and their boxes
    classes: list[str]
    settings: Settings
    verdict: ABVerdict
    map50_95: Total
    map50: Total
    by_class: list[Part]
    by_size: list[Part]
    operating: Operating
    flips: list[Flip]
    pr: PrecisionCurves
    latency: LatencyRatio | None
