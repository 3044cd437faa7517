"""Whether the compressed model keeps enough of the original's mAP within its limits, and the one line that says so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from yolo_compress.errors import RecipeError
from yolo_compress.report.numbers import finite, fixed, percent, percent_apart, runtime, times

Row = Mapping[str, Any]

# Rounding of one division: a row exactly on the bound passes, one that is 1e-9 below does not.
ROUNDING = 1e-12

# Shares of the FP32 accuracy in which MLPerf Inference states its targets (https://github.com/mlcommons/inference_policies).
TIERS = {"95": 0.95, "99": 0.99, "99.9": 0.999}


def reference_row(rows: Sequence[Row]) -> Row | None:
    """What every retention is a ratio to: the original in FP32 here, by torch where that was measured, else the first."""
    here = [row for row in rows if not row.get("device") and row["model"] == "original"]
    original = [row for row in here if (row["precision"], row["status"]) == ("fp32", "ok")]
    return next((row for row in original if row["runtime"] == "torch"), original[0] if original else None)


def peer_row(rows: Sequence[Row], row: Row) -> Row | None:
    """The original in FP32 on the same runtime and device: what a speed-up or a size ratio is honest against."""
    for other in rows:
        same_place = other["runtime"] == row["runtime"] and other.get("device") == row.get("device")
        if same_place and (other["model"], other["precision"], other["status"]) == ("original", "fp32", "ok"):
            return other
    return None


def label(row: Row) -> str:
    """Of a file without an engine here: whom it is for."""
    device = f" on {row['device']}" if row.get("device") else ""
    where = "for" if row["status"] == "untimed" else "on"
    return f"{row['precision'].upper()} {where} {runtime(row['runtime'])}{device}"


def has_accuracy(row: Row) -> bool:
    """Whether its mAP was evaluated; of an "untimed" row nothing else was."""
    return row["status"] in ("ok", "untimed") and row["map50_95"] is not None


def judge(
    rows: Sequence[Row], min_retention: float, max_latency_ms: float | None = None, max_size_mib: float | None = None
) -> dict[str, Any]:
    """Judges the compressed INT8 rows, or the compressed float rows where no INT8 was asked for; the worst decides.

    A row passes when its mAP50-95 divided by the reference's is at least `min_retention` (equality passes). What
    cannot be divided (mAP or reference not a number, reference 0, nothing measured) fails, with the reason. The row that
    decides must also take and give what the reference does, and the worst of those with a latency keep to the limits that are
    given.

    Args:
        rows: bench rows with an `id`, raw figures (NaN allowed).
        min_retention: bound, 0 to 1.
        max_latency_ms: of one inference, p50; None asks for nothing. Files without an engine here ("untimed") have none.
        max_size_mib: of its file; None asks for nothing.

    Returns:
        the three bounds, `reference`, `worst` and `timed` (row ids or None; `timed`: the worst of those with a latency),
        `judged` (one entry a row: `id`, `retention`, `passed`, `reason`), `retention` of the worst, `tiers` (whether it reaches
        each of TIERS; None without retention), `checks` (`name`, `limit`, `value`, `passed`, `reason`), `passed`, `reason` (None
        when passed).
    """
    if not (math.isfinite(min_retention) and 0 <= min_retention <= 1):
        raise RecipeError(f"report.min_retention is {min_retention}, expected a number from 0 to 1")
    reference = reference_row(rows)
    compressed = [row for row in rows if row["model"] == "compressed"]
    asked = [row for row in compressed if row["precision"] == "int8"] or compressed
    candidates = [row for row in asked if has_accuracy(row)]
    judged = [_judge_row(row, reference, min_retention) for row in candidates]
    gate: dict[str, Any] = {
        "min_retention": min_retention,
        "max_latency_ms": max_latency_ms,
        "max_size_mib": max_size_mib,
        "reference": reference["id"] if reference else None,
        "judged": judged,
        "worst": None,
        "timed": None,
        "retention": None,
        "tiers": None,
        "checks": [],
        "passed": False,
        "reason": None,
    }
    if reference is None:
        gate["reason"] = "no FP32 row of the original model was measured, so there is nothing to compare with"
    elif not judged:
        what = "INT8 row" if any(row["precision"] == "int8" for row in compressed) else "row"
        gate["reason"] = f"no {what} of the compressed model was measured"
    else:
        named = {row["id"]: row for row in candidates}
        worst = _worst(judged)
        timed = _worst([entry for entry in judged if named[entry["id"]]["status"] == "ok"])
        row = named[worst["id"]]
        limited = named[timed["id"]] if timed else row
        checks = [
            *_limited(limited, "latency_p50_ms", "p50", "ms", "report.max_latency_ms", max_latency_ms),
            *_limited(limited, "size_mib", "size", "MiB", "report.max_size_mib", max_size_mib),
            *_same_signature(row, reference),
        ]
        reasons = [entry["reason"] for entry in (worst, *checks) if not entry["passed"]]
        gate.update(worst=worst["id"], timed=timed["id"] if timed else None)
        gate.update(retention=worst["retention"], tiers=_tiers(worst["retention"]), checks=checks)
        gate.update(passed=not reasons, reason="; ".join(reasons) or None)
    return gate


def _worst(judged: Sequence[dict[str, Any]]) -> Any:
    """The entry that keeps least; None of none."""
    return min(judged, key=lambda one: -math.inf if one["retention"] is None else one["retention"], default=None)


def _tiers(retention: float | None) -> dict[str, bool] | None:
    return None if retention is None else {name: retention >= share - ROUNDING for name, share in TIERS.items()}


def _limited(row: Row, key: str, name: str, unit: str, knob: str, limit: float | None) -> list[dict[str, Any]]:
    """The check of one figure; none where no limit is asked for."""
    if limit is None:
        return []
    value = finite(row.get(key))
    passed = value is not None and value <= limit
    reason = f"{name} of {label(row)} was not measured, so {knob} cannot be met"
    if value is not None:
        reason = f"{name} of {label(row)} is {value:.4g} {unit}, above {knob}={limit:g}"
    return [{"name": name, "limit": limit, "value": value, "passed": passed, "reason": None if passed else reason}]


def _same_signature(row: Row, reference: Row) -> list[dict[str, Any]]:
    """Whether what takes the original's place fits it: classes, input and output; none where it was not recorded."""
    value, limit = row.get("signature"), reference.get("signature")
    if value is None or limit is None:
        return []
    apart = [f"{key} {value.get(key)}, not {limit[key]}" for key in limit if value.get(key) != limit[key]]
    reason = f"{label(row)} does not fit where the original does: {'; '.join(apart)}" if apart else None
    return [{"name": "signature", "limit": limit, "value": value, "passed": not apart, "reason": reason}]


def _judge_row(row: Row, reference: Row | None, min_retention: float) -> dict[str, Any]:
    base = finite(reference["map50_95"]) if reference else None
    value = finite(row["map50_95"])
    entry: dict[str, Any] = {"id": row["id"], "retention": None, "passed": False, "reason": None}
    if value is None:
        entry["reason"] = f"mAP50-95 of {label(row)} is not a number ({row['map50_95']})"
    elif isinstance(golden := row.get("golden"), Mapping) and golden.get("passed") is False:
        entry["reason"] = f"{label(row)} failed its golden self-test ({golden.get('reason') or 'see bench.py'})"
    elif reference is not None and base is None:
        entry["reason"] = f"the baseline's mAP50-95 is not a number ({reference['map50_95']})"
    elif base is not None and base <= 0:
        entry["reason"] = f"the baseline's mAP50-95 is {base:g}, so no share of it can be kept"
    elif base is not None:
        entry["retention"] = value / base
        entry["passed"] = entry["retention"] >= min_retention - ROUNDING
        if not entry["passed"]:
            kept, bound = percent_apart(entry["retention"], min_retention)
            entry["reason"] = f"{label(row)} keeps {kept}, below the gate of {bound}"
    return entry


def verdict(rows: Sequence[Row], gate: Mapping[str, Any]) -> dict[str, Any]:
    """The first line of every form of the report, about the row that decided.

    Args:
        rows: enriched rows (`retention`, `speed_up`, `size_ratio`).
        gate: what `judge` returned.

    Returns:
        `status` ("pass" or "fail"), `line`, `row` (id of the deciding row or None).
    """
    status = "pass" if gate["passed"] else "fail"
    if gate["retention"] is None:
        return {"status": status, "line": f"FAIL: {gate['reason']}", "row": gate["worst"]}
    by_id = {row["id"]: row for row in rows}
    row, reference = by_id[gate["worst"]], by_id[gate["reference"]]
    kept, bound = percent(gate["retention"]), ""
    if gate["retention"] < gate["min_retention"] - ROUNDING:
        kept, low = percent_apart(gate["retention"], gate["min_retention"])
        bound = f", below the gate of {low}"
    figures = f"({fixed(reference['map50_95'])} -> {fixed(row['map50_95'])})"
    timed = by_id[gate["timed"]] if gate["timed"] else row
    both = [gain(timed["speed_up"], "faster", "slower"), gain(timed["size_ratio"], "smaller", "larger")]
    tail = ", ".join(text for text in both if text)
    apart = "; " if bound else ", "
    if timed is not row:
        apart, tail = "; ", tail and f"{label(timed)} is {tail}"
    line = f"{status.upper()}: {label(row)} keeps {kept} of the baseline's mAP50-95 {figures}{bound}"
    if tail:
        line += apart + tail
    line = "; ".join([line, *(check["reason"] for check in gate["checks"] if not check["passed"])])
    return {"status": status, "line": line, "row": row["id"]}


def gain(ratio: float | None, better: str, worse: str) -> str:
    """Empty where there is no ratio; a loss is named as one."""
    if ratio is None or ratio <= 0:
        return ""
    return f"{times(ratio)} {better}" if ratio >= 1 else f"{times(1 / ratio)} {worse}"
