"""Build the report as one JSON document (`report.schema`). HTML, Markdown and terminal text are made from this document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

from yolo_compress.evaluate.ab.schema import AB
from yolo_compress.report import stage_files
from yolo_compress.report.bench_rows import missing, one_image_set, with_ratios
from yolo_compress.report.controls import judged_control
from yolo_compress.report.gate import judge, verdict
from yolo_compress.report.numbers import finite
from yolo_compress.report.schema import (
    SCHEMA,
    BenchRow,
    ChainStage,
    Control,
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

# A figure cannot be reproduced without these. The report lists those that a run did not record.
PROVENANCE = ("commit", "device", "versions", "imgsz_px", "batch", "warm_up")

FLOAT_STAGES = ("baseline", "sparsify", "prune", "distill")  # the last of them makes the compressed float model
TORCH_KEYS = (
    "latency_p50_ms",
    "latency_p90_ms",
    "latency_p99_ms",
    "map50_95_low",
    "map50_95_high",
    "delta_low",
    "delta_high",
)


def unknown_data() -> DataFacts:
    """Return the data set's entries in the report if nothing is known about the data set."""
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
    """Input of `build`: results of the stages and of bench, not checked yet. `report.schema` has the types and units.

    Attributes:
        recipe: Name of the recipe.
        rows: Bench rows from `with_ids`. If mAP is None, the report shows the latency and the gate ignores the row. A row with the
            mAP NaN fails the gate.
        min_retention: Smallest fraction of the baseline's mAP50-95 that passes the gate, 0 to 1.
        max_latency_ms: Limit of p50 latency for the worst row that has a latency. None: no limit.
        max_size_mib: Limit of the engine's size for the same row. None: no limit.
        chain: Stages in the order in which they ran.
        data: Name, classes, image counts and digests of the data set.
        control: Comparison with models that lack parts of the chain. `retention` is not computed yet.
        ab: Comparison of the baseline in FP32 with the worst row of the gate.
        errors: TIDE's error types of the same two rows.
        latency_quantiles: Row id -> latencies in ms at the quantiles 0, 1, ..., 100 %.
        gammas: Histograms of sparse training.
        channels: Layer -> output channels (before, after) pruning.
        flops: Convolution -> MACs of one image (before, after) pruning.
        sensitivity: Sensitivity of each channel group, from pruning.
        recovery: (epoch, mAP50-95) of the validated epochs of fine-tuning after pruning.
        quantisation: Sensitivity of each group of tensors, from `qat.sensitivity`.
        placement: Rows of `placement.csv`.
        environment: Machine, versions and settings of the run.
        reproduce: Recipe and command.
        not_tested: Sentences on what the run did not test.
    """

    recipe: str
    rows: Sequence[BenchRow]
    min_retention: float
    max_latency_ms: float | None = None
    max_size_mib: float | None = None
    chain: Sequence[StageFigures] = ()
    data: DataFacts = field(default_factory=unknown_data)
    control: Control | None = None
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


def build(findings: Findings) -> Document:
    """Check the results in `findings`, judge the gate and return the report's document. `findings` does not change.

    Raises:
        RecipeError: Rows or stages were measured on different image sets, a row has no image set, or the figures of a stage
            are malformed.
    """
    image_set = one_image_set(findings.rows, findings.chain)
    judgement = judge_rows(
        findings.rows, findings.min_retention, findings.max_latency_ms, findings.max_size_mib, findings.control
    )
    document: Document = {
        "schema": SCHEMA,
        "recipe": findings.recipe,
        **judgement,
        "data": {**findings.data, "image_set": image_set},
        "chain": _chain(findings.chain, judgement["rows"]),
        "not_tested": list(findings.not_tested),
        "not_recorded": _not_recorded(findings.environment),
        "gammas": stage_files.gammas(findings.gammas),
        "channels": stage_files.pairs("channels", findings.channels),
        "flops": stage_files.pairs("FLOPs", findings.flops),
        "sensitivity": stage_files.sensitivity(findings.sensitivity),
        "recovery": stage_files.recovery(findings.recovery),
        "ab": stage_files.ab(findings.ab, image_set),
        "errors": findings.errors,
        "latency_quantiles": stage_files.quantiles(findings.latency_quantiles, findings.rows),
        "quantisation": stage_files.quantisation(findings.quantisation),
        "placement": list(findings.placement),
        "devices": [],
        "references": [],
        "reproduce": findings.reproduce,
        "environment": findings.environment,
    }
    return cast(Document, to_json(document))


class Judgement(TypedDict):
    """The keys of the report's document that depend only on the bench rows and the limits of the gate."""

    verdict: Verdict
    gate: Gate
    control: Control | None
    rows: list[Row]
    missing: list[Missing]


def judge_rows(
    rows: Sequence[BenchRow],
    min_retention: float,
    max_latency_ms: float | None,
    max_size_mib: float | None,
    control: Control | None,
) -> Judgement:
    """Judge the gate. Return the keys of the document that depend only on rows, limits and controls. For the rules see `gate.judge`."""
    gate = judge(rows, min_retention, max_latency_ms, max_size_mib)
    shown = with_ratios(rows)
    compared = judged_control(control, shown, gate)
    return {
        "verdict": verdict(shown, gate, compared),
        "gate": gate,
        "rows": shown,
        "missing": missing(rows),
        "control": compared,
    }


def _not_recorded(environment: Mapping[str, object]) -> list[str]:
    return [key for key in PROVENANCE if environment.get(key) in (None, "", {}, [])]


def _chain(chain: Sequence[StageFigures], rows: Sequence[Row]) -> list[ChainStage]:
    """Return the stages with two additions: mAP difference from the baseline, and latency in torch if `bench` timed the model."""
    base = next((finite(stage.get("map50_95")) for stage in chain if stage["stage"] == "baseline"), None)
    floats = [stage["stage"] for stage in chain if stage["stage"] in FLOAT_STAGES]
    models = {floats[-1]: "compressed", "baseline": "original"} if floats else {}
    stages = []
    for stage in chain:
        value, delta = finite(stage.get("map50_95")), None
        if stage["stage"] not in ("baseline", "teacher") and value is not None and base is not None:
            delta = value - base  # the teacher is another model and has no difference
        timed = _torch_figures(models.get(stage["stage"]), rows)
        stages.append(cast(ChainStage, {**timed, **stage, "delta_map50_95": delta}))
    return stages


def _torch_figures(model: str | None, rows: Sequence[Row]) -> Mapping[str, object]:
    """Return the latency and intervals of a model from its bench row in PyTorch. If there is no such row, return no keys."""
    for row in rows:
        if (row["runtime"], row["model"], row["status"]) == ("torch", model, "ok"):
            figures: Mapping[str, object] = row
            return {key: figures[key] for key in TORCH_KEYS if key in figures}
    return {}


def to_json(value: Any) -> Any:
    """Convert a value to JSON types: numpy scalars to numbers, arrays to lists, paths to text, NaN and infinity to None."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return to_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
