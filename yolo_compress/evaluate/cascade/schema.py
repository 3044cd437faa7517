"""Types of the cascade document, schema 1: what `yolo-compress cascade` measures, and its verdict. Missing figures are null."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

SCHEMA = 1


class Model(TypedDict):
    """One model alone, on the validation images. Latencies are from a decoded image to its detections."""

    label: str  # the text on the command line
    executed: str  # the arithmetic that the runtime chose, as text
    imgsz: list[int]  # [height, width] of the input, px
    onnx_sha256: str
    precision: str
    map50_95: float
    mean_ms: float
    p50_ms: float | None
    p99_ms: float | None  # null: too few calls were timed


class Router(TypedDict):
    """The fitted router, and how well it predicts images that it was not fitted to."""

    features: list[str]
    weights: list[float]
    bias: float
    penalty: float | None  # ridge penalty per image that cross-validation chose; null: no router beats a constant
    explained: float  # share of the variance of the gain that cross-validation explains; 0 or less: useless
    images: int  # images that it was fitted to
    gain: float  # AP that all these images together gain from the large model


class Cascade(TypedDict):
    """The cascade, on the validation images. Latencies are from a decoded image to its detections."""

    threshold: float
    kept: float  # share of the images that only the small model sees
    map50_95: float
    mean_ms: float  # over all validation images, of which `timed_images` were timed
    p50_ms: float | None
    p99_ms: float | None  # about the sum of both models: an image that needs the large model goes through both
    kept_ms: float | None  # mean of the images that only the small model sees; null: there is none
    handed_ms: float | None  # mean of the other images
    timed_images: int
    expected_kept: float  # share that was expected from the images of the fit


class Control(TypedDict):
    """The best static choice at the cascade's mean latency: one model, or two models with a share of the images each."""

    label: str
    map50_95: float


class Verdict(TypedDict):
    status: Literal["pass", "fail", "inconclusive"]
    line: str
    instead: str  # "small", "large" or "static": the best model alone for the same demand
    delta: float | None  # mAP50-95 of the cascade minus that of the control
    low: float | None  # ends of the 95 % interval of delta
    high: float | None
    met: (
        bool | None
    )  # whether the cascade meets latency_ms or max_drop on the validation images; null: neither was given


class Demand(TypedDict):
    latency_ms: float | None  # largest mean latency
    max_drop: float | None  # fraction of the large model's mAP50-95 that the cascade may lose


class CascadeDocument(TypedDict):
    schema: int
    small: Model
    large: Model
    static: Model | None
    names: list[str]
    image_set: str  # digest of the validation images and their boxes
    images: int  # validation images
    demand: Demand
    router: Router
    cascade: Cascade | None  # null: no router, or no threshold meets the demand
    control: Control | None
    verdict: Verdict
    quiet: bool  # whether other programs were idle while latencies were measured


def validated(content: object) -> CascadeDocument:
    """Check that a parsed JSON value is a cascade document, and return it.

    Raises:
        ValueError: It has another schema, or a key of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"schema {schema!r}, expected {SCHEMA}")
    try:
        return TypeAdapter(CascadeDocument).validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
