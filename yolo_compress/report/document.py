"""The report as one JSON document (schema 3): every other form is drawn from it and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yolo_compress.errors import RecipeError
from yolo_compress.report import stage_files
from yolo_compress.report.gate import has_accuracy, judge, label, peer_row, reference_row, verdict
from yolo_compress.report.numbers import RUNTIMES, finite

SCHEMA = 3  # 3: rows of files without an engine ("untimed"), gate.timed, the test by image; 2: ab, errors, placement, devices
MODELS = ("original", "compressed")
PRECISIONS = ("fp32", "fp16", "int8")
STATUSES = ("ok", "untimed", "missing")

# MLPerf Inference's minimum of queries for a 99th percentile (its early-stopping rule).
P99_MIN_N = 662

# Without these a figure cannot be repeated; what a run did not record is listed in the report by name.
PROVENANCE = ("commit", "device", "versions", "imgsz_px", "batch", "warm_up")

DATA: Mapping[str, Any] = {
    "yaml": None,
    "names": [],
    "train_images": None,
    "val_images": None,
    "skipped": [],
    "notes": [],
    "digest": None,
}


def build(
    recipe: str,
    chain: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
    *,
    min_retention: float,
    max_latency_ms: float | None = None,
    max_size_mib: float | None = None,
    ab: Mapping[str, Any] | None = None,
    gammas: Mapping[str, Any] | None = None,
    channels: Mapping[str, Sequence[int]] | None = None,
    flops: Mapping[str, Sequence[int]] | None = None,
    sensitivity: Mapping[str, Any] | None = None,
    recovery: Sequence[Sequence[float]] | None = None,
    environment: Mapping[str, Any] | None = None,
    reproduce: Mapping[str, Any] | None = None,
    not_tested: Sequence[str] = (),
    errors: Mapping[str, Any] | None = None,
    latency_quantiles: Mapping[str, Sequence[float]] | None = None,
    quantisation: Mapping[str, Any] | None = None,
    placement: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """Checks the figures, judges the gate and returns the document; the inputs are left as they are.

    Args:
        recipe: its name.
        chain: one mapping a stage, in order: `stage`, `fingerprint`, `status`, `parameters`, `compute_gflops`,
            `size_mib`, `map50_95`, `map50`, `seconds`, `epochs` (None where there is none), optional `image_set`; of
            prune, all optional, `kept_flops`, `map50_95_after_cut`, `map50_95_after_bn`, `latency_target_ms`,
            `latency_measured_ms`, `latency_runtime`; optional `map50_95_low`, `map50_95_high` (95 % interval), `delta_low`,
            `delta_high` (of the paired difference from the baseline).
        rows: bench rows: `model`, `runtime`, `precision`, `status` ("ok", "untimed" or "missing"), `reason`, and for "ok"
            `executed`, `map50_95`, `map50`, `map50_95_ultralytics`, `latency_p50_ms`, `latency_p90_ms`,
            `latency_p99_ms`, `latency_n`, `size_mib`, `parameters`, `compute_gflops`, `image_set`; optional `device` and the
            intervals of `chain`. An mAP of None was not measured: the row shows its latency and is not judged. "untimed" is a
            `file` that no engine here was built from: it has all that "ok" has but latency and size.
        data: `yaml`, `names`, `train_images`, `val_images`, `skipped` (findings), `notes`, `digest`; all
            optional.
        min_retention: share of the original's mAP50-95 that must be kept, 0 to 1.
        max_latency_ms, max_size_mib: limits of the row that decides; None asks for nothing.
        ab: the original in FP32 against that row, see `evaluate.ab.document.compare`.
        gammas: `edges` (n + 1 floats) and `epochs` (one list of n counts an epoch).
        channels: `{layer: [before, after]}`.
        flops: `{convolution: [MACs before, MACs after]}` for one image.
        sensitivity: `measure` ("loss" or "map50_95"), `dense` (its value of the unpruned net), `ratios` (shares of
            channels removed, ascending), `groups` ({group: [value at each ratio]}), `caps` ({group: the largest share
            that may go, or None}), `images` (how many it was measured on).
        recovery: [epoch, mAP50-95] of the validated epochs of fine-tuning, by Ultralytics' validator.
        environment: the keys of `PROVENANCE` and whatever else was recorded, nested mappings allowed.
        reproduce: `recipe_yaml` (text) and `command`, both optional.
        not_tested: sentences.
        errors: `evaluate.tide.errors` of both, `a` and `b`, over all detections, and `shown_a`, `shown_b` of those with a score of
            `conf` or more.
        latency_quantiles: `{row id: [ms at 0, 1, ..., 100 % of its raw calls]}`.
        quantisation: what `qat.sensitivity` left: `measure`, `float`, `int8`, `worst`, `then`, `left`, `images`, `groups`, `price`,
            `compute_gflops` and, where the price was measured, `price_ms`.
        placement: rows of `placement.csv`: `tensor`, `precision`, `group`, `why`.

    Raises:
        RecipeError: rows or stages measured over different image sets, a row given twice or with an unknown model,
            precision or without an image set, malformed figures of a stage.
    """
    in_place = identified(rows)
    image_set = _one_image_set(in_place, chain)
    surroundings = dict(environment or {})
    document = {
        "schema": SCHEMA,
        "recipe": recipe,
        **judged(in_place, min_retention, max_latency_ms, max_size_mib),
        "data": {**DATA, **data, "image_set": image_set},
        "chain": _with_delta([_with_torch(stage, chain, in_place) for stage in chain]),
        "not_tested": list(not_tested),
        "not_recorded": [key for key in PROVENANCE if surroundings.get(key) in (None, "", {}, [])],
        "gammas": stage_files.gammas(gammas),
        "channels": stage_files.pairs("channels", channels),
        "flops": stage_files.pairs("FLOPs", flops),
        "sensitivity": stage_files.sensitivity(sensitivity),
        "recovery": stage_files.recovery(recovery),
        "ab": stage_files.ab(ab, image_set),
        "errors": dict(errors) if errors else None,
        "latency_quantiles": stage_files.quantiles(latency_quantiles, in_place),
        "quantisation": stage_files.quantisation(quantisation),
        "placement": [dict(row) for row in placement],
        "devices": [],
        "references": [],
        "reproduce": {"recipe_yaml": None, "command": None, **(reproduce or {})},
        "environment": surroundings,
    }
    return dict(plain(document))


def judged(
    rows: Sequence[Mapping[str, Any]],
    min_retention: float,
    max_latency_ms: float | None = None,
    max_size_mib: float | None = None,
) -> dict[str, Any]:
    """What follows from the rows alone: `verdict`, `gate`, `rows` with their ratios and `missing`."""
    gate = judge(rows, min_retention, max_latency_ms, max_size_mib)
    enriched = [_enrich(row, rows) for row in rows]
    return {
        "verdict": verdict(enriched, gate),
        "gate": gate,
        "rows": enriched,
        "missing": _missing(rows),
    }


def identified(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with an id, by device, runtime, model and precision, so that what is compared stands together."""
    runtimes = [*RUNTIMES, *sorted({str(row["runtime"]) for row in rows} - set(RUNTIMES))]
    devices = list(dict.fromkeys(row.get("device") for row in rows))
    named: dict[str, dict[str, Any]] = {}
    for row in rows:
        for key, allowed in (("model", MODELS), ("precision", PRECISIONS), ("status", STATUSES)):
            if row[key] not in allowed:
                raise RecipeError(f"bench row has {key} {row[key]!r}, expected one of {', '.join(allowed)}")
        parts = [row["model"], row["runtime"], row["precision"], *([row["device"]] if row.get("device") else [])]
        identity = "-".join(parts)
        if identity in named:
            raise RecipeError(f"bench row {identity} is given twice; a report shows each once")
        named[identity] = {"id": identity, **row}

    def place(row: Mapping[str, Any]) -> tuple[int, ...]:
        return (
            devices.index(row.get("device")),
            runtimes.index(row["runtime"]),
            MODELS.index(row["model"]),
            PRECISIONS.index(row["precision"]),
        )

    return sorted(named.values(), key=place)


def _one_image_set(rows: Sequence[Mapping[str, Any]], chain: Sequence[Mapping[str, Any]]) -> str | None:
    """The image set of every mAP in the report; two sets are two reports."""
    where: dict[str, str] = {}
    for row in rows:
        if not has_accuracy(row):
            continue
        if not row.get("image_set"):
            raise RecipeError(f"bench row {row['id']} does not say over which images it was measured (image_set)")
        where.setdefault(row["image_set"], f"{row['model']} {label(row)}")
    for stage in chain:
        if stage.get("image_set") and finite(stage.get("map50_95")) is not None:
            where.setdefault(stage["image_set"], f"stage {stage['stage']}")
    if len(where) > 1:
        (first, at_first), (second, at_second) = list(where.items())[:2]
        raise RecipeError(
            f"metrics over different images are never put in one table: {at_first} over image set {first}, "
            f"{at_second} over {second}; run bench again on one data yaml"
        )
    return next(iter(where), None)


def _enrich(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    reference, peer = reference_row(rows), peer_row(rows, row)
    enriched = {**row, "retention": None, "speed_up": None, "size_ratio": None, "notes": []}
    if row["status"] == "missing":
        return enriched
    if reference is not None:
        enriched["retention"] = _ratio(row["map50_95"], reference["map50_95"])
    if row["map50_95"] is not None and finite(row["map50_95"]) is None:
        enriched["notes"].append(f"mAP50-95 is not a number ({row['map50_95']})")
    if row["status"] == "untimed":
        return enriched
    if peer is not None:
        enriched["speed_up"] = _ratio(peer.get("latency_p50_ms"), row.get("latency_p50_ms"))
        enriched["size_ratio"] = _ratio(peer.get("size_mib"), row.get("size_mib"))
    n = finite(row.get("latency_n")) or 0
    if n < P99_MIN_N:
        enriched["latency_p99_ms"] = None
        if finite(row.get("latency_p50_ms")) is not None:
            enriched["notes"].append(f"p99 withheld: n = {n:.0f}, at least {P99_MIN_N} needed")
    return enriched


def _ratio(top: Any, bottom: Any) -> float | None:
    above, below = finite(top), finite(bottom)
    return None if above is None or below is None or below <= 0 else above / below


FLOAT = ("baseline", "sparsify", "prune", "distill")  # the last of them there is makes the compressed float model
OF_TORCH = (
    "latency_p50_ms",
    "latency_p90_ms",
    "latency_p99_ms",
    "map50_95_low",
    "map50_95_high",
    "delta_low",
    "delta_high",
)


def _with_torch(
    stage: Mapping[str, Any], chain: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Adds what bench measured of the stage's own model in PyTorch: the baseline and the compressed float model."""
    floats = [other["stage"] for other in chain if other["stage"] in FLOAT]
    models = {floats[-1]: "compressed", "baseline": "original"} if floats else {}
    found = next(
        (
            _enrich(row, rows)
            for row in rows
            if (row["runtime"], row["model"], row["status"]) == ("torch", models.get(stage["stage"]), "ok")
        ),
        {},
    )
    return {**{key: found[key] for key in OF_TORCH if key in found}, **stage}


def _with_delta(chain: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Adds `delta_map50_95` against the baseline; the teacher is another network and has none."""
    base = next((finite(stage.get("map50_95")) for stage in chain if stage["stage"] == "baseline"), None)
    result = []
    for stage in chain:
        value = finite(stage.get("map50_95"))
        own = stage["stage"] in ("baseline", "teacher") or value is None or base is None
        result.append({**stage, "delta_map50_95": None if own or value is None or base is None else value - base})
    return result


def _missing(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for and not measured, one entry a runtime and reason."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["status"] == "missing":
            reason = row.get("reason") or "no reason given"
            key = (row.get("device"), row["runtime"], reason)
            entry = groups.setdefault(
                key,
                {
                    "runtime": row["runtime"],
                    "models": [],
                    "precisions": [],
                    "reason": reason,
                    "device": row.get("device"),
                },
            )
            for name, value in (("models", row["model"]), ("precisions", row["precision"])):
                if value not in entry[name]:
                    entry[name].append(value)
    return list(groups.values())


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
