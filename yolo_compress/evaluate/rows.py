"""Types of the rows of `engines.json` and of the bench. A row is a model on a runtime in a precision, with its measurements.

mAP is a fraction from 0 to 1 on the validation images, by pycocotools. In `model`, "original" is the baseline.
"""

from __future__ import annotations

import json
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from yolo_compress.runtime.registry import Precision
from yolo_compress.store.manifest import Artifact

Model = Literal["original", "compressed"]
ENGINES = "engines.json"  # file in the artefact of `engine`


class EngineRow(TypedDict):
    """A row of `engines.json`: a requested engine, or the reason why this engine was not built."""

    model: Model
    runtime: str  # a runtime's name, such as "openvino"
    precision: Precision
    source: str  # file of `export` that the engine is built from
    reason: str | None  # why the engine was not built; null if it was
    folder: NotRequired[str]  # folder in the artefact; absent if the engine was not built
    size_mib: NotRequired[float]  # size of the files that a robot needs; absent if the engine was not built
    choice: NotRequired[str]  # why it was built from `source`, as text; absent if there was only one file to build from


class Signature(TypedDict):
    """Class names and shapes of input and output of a model."""

    names: list[str]  # class names in the order of their index
    imgsz: list[int]  # [height, width] of the input, px
    output: list[int]  # shape of the output of one image


class Subject(TypedDict):
    """Keys of every bench row: the model, its runtime and its precision."""

    model: Model
    runtime: str  # a runtime's name, or "torch"; in an untimed row, the runtime that the file is made for
    precision: Precision  # the requested precision
    file: str | None  # file of `export` that the engine is built from; null for torch
    reason: str | None  # why there is no engine or no measurement
    choice: NotRequired[str]  # why the engine was built from `file`; absent if there was only one file to build from
    gpu: NotRequired[str]  # name of the GPU that torch computed on; absent on a CPU and for engines
    parameters: int
    compute_gflops: float  # 2 x GMACs of one image


class Accuracy(TypedDict):
    """The accuracy of an engine or a file."""

    executed: str  # the arithmetic that the runtime chose, as text
    map50_95: float  # mean over IoU 0.5 to 0.95
    map50: float
    per_class: dict[str, float | None]  # map50_95 by class name; null without ground truth
    map50_95_ultralytics: float  # map50_95 as Ultralytics' validator computes it
    image_set: str  # digest of the validation images and their boxes
    signature: Signature


class Latency(TypedDict):
    """The latency of one inference. A percentile is null if too few calls were timed."""

    latency_p50_ms: float | None
    latency_p90_ms: float | None
    latency_p95_ms: float | None
    latency_p99_ms: float | None
    latency_n: int  # timed calls
    latency_quiet: bool  # whether other programs were idle in all rounds, and the engine between them
    threads: int | None  # threads of one inference on a CPU; null: one per processor, or a GPU


class MeasuredBenchRow(Subject, Accuracy, Latency):
    """Row of an engine, or of torch, that was evaluated and timed."""

    status: Literal["ok"]
    size_mib: float  # size of the engine, or of torch's checkpoint


class UntimedBenchRow(Subject, Accuracy):
    """Row of a file for which no engine was built here. It has an accuracy, but no latency or size."""

    status: Literal["untimed"]


class MissingBenchRow(Subject):
    """Row of a requested engine that was not measured. The key `reason` says why."""

    status: Literal["missing"]


BenchRow = MeasuredBenchRow | UntimedBenchRow | MissingBenchRow


def engine_rows(engines: Artifact) -> list[EngineRow]:
    """Read the rows of `engines.json` in an artefact of `engine`."""
    rows: list[EngineRow] = json.loads(engines.file(ENGINES).read_text())
    return rows


def bench_rows(bench: Artifact) -> list[BenchRow]:
    """Return the rows of an artefact of `bench`."""
    rows: list[BenchRow] = bench.metrics["rows"]
    return rows
