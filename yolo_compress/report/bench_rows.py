"""Identify, sort and compare bench rows. A bench row has the measurements of one model in one runtime and precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeGuard, TypeVar, cast, get_args

from yolo_compress.errors import RecipeError
from yolo_compress.report.numbers import RUNTIMES, finite, model, runtime, three_digits
from yolo_compress.report.schema import (
    BenchRow,
    EvaluatedBenchRow,
    MeasuredBenchRow,
    Missing,
    Model,
    Precision,
    Row,
    StageFigures,
    Status,
)
from yolo_compress.runtime.measure.latency import LEAST_SAMPLES

ALLOWED = {"model": get_args(Model), "precision": get_args(Precision), "status": get_args(Status)}

P99_MIN_N = LEAST_SAMPLES[99]

Form = TypeVar("Form", bound=Mapping[str, object])


def with_ids(rows: Iterable[Mapping[str, object]]) -> list[BenchRow]:
    """Return bench rows sorted by device, runtime, model and precision, each with an id.

    Args:
        rows: Rows from the metrics of the stage `bench` or from a `device.json`. If a row has an id, the id does not change.

    Raises:
        RecipeError: A row has an unknown model, precision or status, or occurs twice.
    """
    by_id: dict[str, BenchRow] = {}
    for given in rows:
        for key, allowed in ALLOWED.items():
            if given[key] not in allowed:
                raise RecipeError(f"bench row has {key} {given[key]!r}, expected one of {', '.join(allowed)}")
        row = cast(BenchRow, given)
        parts = [row["model"], row["runtime"], row["precision"], *([row["device"]] if row.get("device") else [])]
        identity = "-".join(parts)
        if identity in by_id:
            raise RecipeError(f"bench row {identity} is given twice; a report shows each once")
        by_id[identity] = cast(BenchRow, {"id": identity, **given})
    runtimes = [*RUNTIMES, *sorted({row["runtime"] for row in by_id.values()} - set(RUNTIMES))]
    devices = list(dict.fromkeys(row.get("device") for row in by_id.values()))

    def order(row: BenchRow) -> tuple[int, ...]:
        return (
            devices.index(row.get("device")),
            runtimes.index(row["runtime"]),
            ALLOWED["model"].index(row["model"]),
            ALLOWED["precision"].index(row["precision"]),
        )

    return sorted(by_id.values(), key=order)


def with_keys(row: Form, keys: Mapping[str, object]) -> Form:
    """Return a copy of `row`, a bench row or a stage's entry, with `keys` added or replaced. The type of `row` must have these keys."""
    return cast(Form, {**row, **keys})


def place(row: Mapping[str, object]) -> str:
    """Return the runtime of a row. In brackets: the name of another machine, or the GPU that torch computed on."""
    where = row.get("device") or row.get("gpu")
    return runtime(str(row["runtime"])) + (f" ({where})" if where else "")


def label(row: BenchRow) -> str:
    """Return the precision, runtime and device of a row as text. For a file without an engine, name its target runtime."""
    if row["status"] == "untimed":
        return f"{row['precision'].upper()} for {runtime(row['runtime'])}"
    if row.get("device"):
        return f"{row['precision'].upper()} on {runtime(row['runtime'])} on {row['device']}"
    return f"{row['precision'].upper()} on {place(row)}"


def has_accuracy(row: BenchRow) -> TypeGuard[EvaluatedBenchRow]:
    """Return whether the row has an mAP."""
    return row["status"] in ("ok", "untimed") and row["map50_95"] is not None


def reference_row(rows: Sequence[BenchRow]) -> MeasuredBenchRow | None:
    """Return the reference of all retentions: the row of the FP32 baseline on this machine, preferably in torch."""
    here = [row for row in rows if not row.get("device") and row["model"] == "original" and row["precision"] == "fp32"]
    measured = [row for row in here if row["status"] == "ok"]
    return next((row for row in measured if row["runtime"] == "torch"), measured[0] if measured else None)


def peer_row(rows: Sequence[BenchRow], row: BenchRow) -> MeasuredBenchRow | None:
    """Return the reference of a row's speed-up and size ratio: the row of the FP32 baseline on the same runtime and device."""
    for other in rows:
        same_place = other["runtime"] == row["runtime"] and other.get("device") == row.get("device")
        if same_place and (other["model"], other["precision"]) == ("original", "fp32") and other["status"] == "ok":
            return other
    return None


def one_image_set(rows: Sequence[BenchRow], chain: Sequence[StageFigures]) -> str | None:
    """Check that every mAP was measured on the same images, and return the digest of that image set. None: there is no mAP.

    Raises:
        RecipeError: There are two image sets, or a row with mAP has none.
    """
    where: dict[str, str] = {}
    for row in rows:
        if not has_accuracy(row):
            continue
        image_set = row.get("image_set")
        if not image_set:
            raise RecipeError(
                f"bench row {row['id']} has no image_set, the digest of the images that it was measured on"
            )
        where.setdefault(image_set, f"{model(row['model'])} {label(row)}")
    for stage in chain:
        if stage.get("image_set") and finite(stage.get("map50_95")) is not None:
            where.setdefault(stage["image_set"], f"stage {stage['stage']}")
    if len(where) > 1:
        (first, at_first), (second, at_second) = list(where.items())[:2]
        raise RecipeError(
            f"figures over different images cannot stand in one report: {at_first} is over image set {first}, "
            f"{at_second} over {second}; run bench again on one data yaml"
        )
    return next(iter(where), None)


def with_ratios(rows: Sequence[BenchRow]) -> list[Row]:
    """Add retention, speed-up and size ratio to the rows, and remove p99 where too few calls were timed."""
    return [_with_ratios(row, rows) for row in rows]


def _with_ratios(row: BenchRow, rows: Sequence[BenchRow]) -> Row:
    reference, peer = reference_row(rows), peer_row(rows, row)
    notes: list[str] = []
    added: dict[str, object] = {"retention": None, "speed_up": None, "size_ratio": None, "notes": notes}
    if row["status"] != "missing":
        if reference is not None:
            added["retention"] = _ratio(row["map50_95"], reference["map50_95"])
        if row["map50_95"] is not None and finite(row["map50_95"]) is None:
            notes.append(f"mAP50-95 is not a number ({row['map50_95']})")
    if row["status"] == "ok":
        if "choice" in row:
            notes.append(f"Built from {row['choice']}")
        if (faster := _faster_than_int8(row, rows)) is not None:
            notes.append(
                f"INT8 gains nothing here: {faster['precision'].upper()} on the same runtime takes "
                f"{three_digits(faster['latency_p50_ms'])} ms, INT8 {three_digits(row['latency_p50_ms'])} ms"
            )
        if peer is not None:
            added["speed_up"] = _ratio(peer.get("latency_p50_ms"), row.get("latency_p50_ms"))
            added["size_ratio"] = _ratio(peer.get("size_mib"), row.get("size_mib"))
        n = finite(row.get("latency_n")) or 0
        if n < P99_MIN_N:
            added["latency_p99_ms"] = None
            if finite(row.get("latency_p50_ms")) is not None:
                notes.append(f"p99 withheld: n = {n:.0f}, at least {P99_MIN_N} needed")
    return cast(Row, {**row, **added})


def _faster_than_int8(row: MeasuredBenchRow, rows: Sequence[BenchRow]) -> MeasuredBenchRow | None:
    """Return the fastest row of the same model, runtime and device in float, if it is faster than `row`, which is in INT8."""
    own = finite(row.get("latency_p50_ms"))
    if row["precision"] != "int8" or own is None:
        return None
    faster = [
        (ms, other)
        for other in rows
        if other["status"] == "ok"
        and other["precision"] != "int8"
        and (other["model"], other["runtime"], other.get("device")) == (row["model"], row["runtime"], row.get("device"))
        and (ms := finite(other.get("latency_p50_ms"))) is not None
        and ms < own
    ]
    return min(faster, key=lambda one: one[0])[1] if faster else None


def _ratio(top: object, bottom: object) -> float | None:
    above, below = finite(top), finite(bottom)
    return None if above is None or below is None or below <= 0 else above / below


def missing(rows: Sequence[BenchRow]) -> list[Missing]:
    """Group the missing rows by device, runtime and reason."""
    groups: dict[tuple[str | None, str, str], Missing] = {}
    for row in rows:
        if row["status"] != "missing":
            continue
        device, reason = row.get("device"), row.get("reason") or "no reason given"
        entry = groups.setdefault(
            (device, row["runtime"], reason),
            {"runtime": row["runtime"], "models": [], "precisions": [], "reason": reason, "device": device},
        )
        if row["model"] not in entry["models"]:
            entry["models"].append(row["model"])
        if row["precision"] not in entry["precisions"]:
            entry["precisions"].append(row["precision"])
    return list(groups.values())
