"""Rows of `engines.json` and of the bench: a model on a runtime in a precision, and what was measured of it.

mAP is a fraction from 0 to 1, over the validation images, by pycocotools. In `model`, "original" is the baseline.
"""

from __future__ import annotations

import json
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from yolo_compress.store.manifest import Artifact

Model = Literal["original", "compressed"]
Precision = Literal["fp32", "fp16", "int8"]
ENGINES = "engines.json"  # of the artefact of `engine`


class EngineRow(TypedDict):
    """A row of `engines.json`."""

    model: Model
    runtime: str  # a runtime's name, such as "openvino"
    precision: Precision
    source: str  # file of `export` that the engine is built from
    reason: str | None  # why it was not built; null where it was
    folder: NotRequired[str]  # in the artefact; absent where it was not built, as `size_mib`
    size_mib: NotRequired[float]  # of the files that a robot needs


class Signature(TypedDict):
    """What a model takes and gives."""

    names: list[str]  # class names in the order of their index
    imgsz: list[int]  # [height, width] of the input, px
    output: list[int]  # shape of the output of one image


class Subject(TypedDict):
    """What every bench row has: the model, where it runs, and in which precision."""

    model: Model
    runtime: str  # a runtime's name, or "torch"; of an untimed row the one that the file is made for
    precision: Precision  # as asked for
    file: str | None  # of `export`, that the engine is built from; null for torch
    reason: str | None  # why there is no engine or no measurement
    parameters: int
    compute_gflops: float  # 2 x GMACs of one image


class Accuracy(TypedDict):
    """The accuracy of an engine or a file."""

    executed: str  # the arithmetic that the runtime chose, in words
    map50_95: float  # mean over IoU 0.5 to 0.95
    map50: float
    per_class: dict[str, float | None]  # map50_95 by class name; null without ground truth
    map50_95_ultralytics: float  # map50_95 as Ultralytics' validator computes it
    image_set: str  # digest of the validation images and their boxes
    signature: Signature


class Latency(TypedDict):
    """The latency of one inference; a percentile is null where too few calls were timed to state it."""

    latency_p50_ms: float | None
    latency_p90_ms: float | None
    latency_p95_ms: float | None
    latency_p99_ms: float | None
    latency_n: int  # timed calls
    latency_quiet: bool  # whether the machine was idle before each round
    threads: int | None  # of one inference on a CPU; null: every processor, or a GPU


class MeasuredBenchRow(Subject, Accuracy, Latency):
    """An engine, or torch, that was evaluated and timed."""

    status: Literal["ok"]
    size_mib: float  # of the engine, or of torch's checkpoint


class UntimedBenchRow(Subject, Accuracy):
    """A file that no engine here was built from: it has accuracy, but neither latency nor size."""

    status: Literal["untimed"]


class MissingBenchRow(Subject):
    """What was asked for and not measured."""

    status: Literal["missing"]


BenchRow = MeasuredBenchRow | UntimedBenchRow | MissingBenchRow


def engine_rows(engines: Artifact) -> list[EngineRow]:
    """The rows of `engines.json` in an artefact of `engine`."""
    rows: list[EngineRow] = json.loads(engines.file(ENGINES).read_text())
    return rows


def bench_rows(bench: Artifact) -> list[BenchRow]:
    """The rows of an artefact of `bench`."""
    rows: list[BenchRow] = bench.metrics["rows"]
    return rows
