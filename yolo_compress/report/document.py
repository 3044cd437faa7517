"""The report as one JSON document (`report.schema`): every other form is drawn from it and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

from yolo_compress.evaluate.ab.schema import AB
from yolo_compress.report import stage_files
from yolo_compress.report.bench_rows import missing, one_image_set, with_ratios
from yolo_compress.report.gate import judge, verdict
from yolo_compress.report.numbers import finite
from yolo_compress.report.schema import (
    SCHEMA,
    BenchRow,
    ChainStage,
    DataFacts,
    Document,
    Environment,
    ErrorTypes,
    Gammas,
    Gate,
    Missing,
    QuantisationFile,
    Reproduce,
    Row,
    SensitivityFile,
    StageFigures,
    Tensor,
    Verdict,
)

# Without these a figure cannot be repeated; what a run did not record is listed in the report by name.
PROVENANCE = ("commit", "device", "versions", "imgsz_px", "batch", "warm_up")

FLOAT = ("baseline", "sparsify", "prune", "distill")  # the last of them in a chain makes the compressed float model
OF_TORCH = (
    "latency_p50_ms",
    "latency_p90_ms",
    "latency_p99_ms",
    "map50_95_low",
    "map50_95_high",
    "delta_low",
    "delta_high",
)


def unknown_data() -> DataFacts:
    """The dataset of a report that knows nothing of it."""
    return {
        "yaml": None,
        "names": [],
        "train_images": None,
        "val_images": None,
        "skipped": [],
        "notes": [],
        "digest": None,
    }


@dataclass(frozen=True)
class Findings:
    """What the stages and the bench found, before it is checked and judged. `report.schema` has the types and their units.

    Attributes:
        recipe: Its name.
        rows: Bench rows from `identified`. An mAP of None was not measured: the row shows its latency and is not judged.
        min_retention: Least share of the baseline's mAP50-95, 0 to 1.
        max_latency_ms: Largest p50 latency of the row that decides; None: no limit.
        max_size_mib: Largest size of that row's engine; None: no limit.
        chain: The stages in the order of work.
        data: The dataset.
        ab: The baseline in FP32 against the row that decides.
        errors: TIDE's error types of the same two.
        latency_quantiles: By row id, ms within which 0, 1, ..., 100 % of the calls are done.
        gammas: Histograms of sparse training.
        channels: Output channels before and after pruning, by layer.
        flops: MACs of one image before and after pruning, by convolution.
        sensitivity: What pruning measured of each channel group.
        recovery: (epoch, mAP50-95) of the validated epochs of fine-tuning after pruning.
        quantisation: What `qat.sensitivity` measured of each group of tensors.
        placement: Rows of `placement.csv`.
        environment: What a repetition needs.
        reproduce: Recipe and command.
        not_tested: Sentences on what the reader should not assume.
    """

    recipe: str
    rows: Sequence[BenchRow]
    min_retention: float
    max_latency_ms: float | None = None
    max_size_mib: float | None = None
    chain: Sequence[StageFigures] = ()
    data: DataFacts = field(default_factory=unknown_data)
    ab: AB | None = None
    errors: ErrorTypes | None = None
    latency_quantiles: Mapping[str, Sequence[float]] | None = None
    gammas: Gammas | None = None
    channels: Mapping[str, Sequence[int]] | None = None
    flops: Mapping[str, Sequence[int]] | None = None
    sensitivity: SensitivityFile | None = None
    recovery: Sequence[Sequence[float]] | None = None
    quantisation: QuantisationFile | None = None
    placement: Sequence[Tensor] = ()
    environment: Environment = field(default_factory=Environment)
    reproduce: Reproduce = field(default_factory=lambda: Reproduce(recipe_yaml=None, command=None))
    not_tested: Sequence[str] = ()


def build(found: Findings) -> Document:
    """Checks the findings, judges the gate and returns the document; the findings are left as they are.

    Raises:
        RecipeError: Rows or stages measured over different image sets, a row without an image set, or malformed
            figures of a stage.
    """
    image_set = one_image_set(found.rows, found.chain)
    judgement = judged(found.rows, found.min_retention, found.max_latency_ms, found.max_size_mib)
    document: Document = {
        "schema": SCHEMA,
        "recipe": found.recipe,
        **judgement,
        "data": {**found.data, "image_set": image_set},
        "chain": _chain(found.chain, judgement["rows"]),
        "not_tested": list(found.not_tested),
        "not_recorded": _not_recorded(found.environment),
        "gammas": stage_files.gammas(found.gammas),
        "channels": stage_files.pairs("channels", found.channels),
        "flops": stage_files.pairs("FLOPs", found.flops),
        "sensitivity": stage_files.sensitivity(found.sensitivity),
        "recovery": stage_files.recovery(found.recovery),
        "ab": stage_files.ab(found.ab, image_set),
        "errors": found.errors,
        "latency_quantiles": stage_files.quantiles(found.latency_quantiles, found.rows),
        "quantisation": stage_files.quantisation(found.quantisation),
        "placement": list(found.placement),
        "devices": [],
        "references": [],
        "reproduce": found.reproduce,
        "environment": found.environment,
    }
    return cast(Document, plain(document))


class Judgement(TypedDict):
    """The keys of a document that follow from the rows and the limits alone."""

    verdict: Verdict
    gate: Gate
    rows: list[Row]
    missing: list[Missing]


def judged(
    rows: Sequence[BenchRow], min_retention: float, max_latency_ms: float | None, max_size_mib: float | None
) -> Judgement:
    """What follows from the rows alone; see `gate.judge`."""
    gate = judge(rows, min_retention, max_latency_ms, max_size_mib)
    shown = with_ratios(rows)
    return {"verdict": verdict(shown, gate), "gate": gate, "rows": shown, "missing": missing(rows)}


def _not_recorded(environment: Mapping[str, object]) -> list[str]:
    return [key for key in PROVENANCE if environment.get(key) in (None, "", {}, [])]


def _chain(chain: Sequence[StageFigures], rows: Sequence[Row]) -> list[ChainStage]:
    """The stages with their difference from the baseline, and the torch latencies of the models that bench timed."""
    base = next((finite(stage.get("map50_95")) for stage in chain if stage["stage"] == "baseline"), None)
    floats = [stage["stage"] for stage in chain if stage["stage"] in FLOAT]
    models = {floats[-1]: "compressed", "baseline": "original"} if floats else {}
    stages = []
    for stage in chain:
        value, delta = finite(stage.get("map50_95")), None
        if stage["stage"] not in ("baseline", "teacher") and value is not None and base is not None:
            delta = value - base  # the teacher is another model and has none
        timed = _torch_figures(models.get(stage["stage"]), rows)
        stages.append(cast(ChainStage, {**timed, **stage, "delta_map50_95": delta}))
    return stages


def _torch_figures(model: str | None, rows: Sequence[Row]) -> Mapping[str, object]:
    """Latency and intervals that bench measured of a model in PyTorch; empty where it did not."""
    for row in rows:
        if (row["runtime"], row["model"], row["status"]) == ("torch", model, "ok"):
            figures: Mapping[str, object] = row
            return {key: figures[key] for key in OF_TORCH if key in figures}
    return {}


def plain(value: Any) -> Any:
    """JSON types only: numpy scalars and arrays become numbers and lists, paths text, what is not finite null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
