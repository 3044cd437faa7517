"""Judge whether the compressed model meets the limits on retention, latency and size, and write the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from yolo_compress.errors import RecipeError
from yolo_compress.report.bench_rows import has_accuracy, label, reference_row
from yolo_compress.report.controls import CONTROLS
from yolo_compress.report.numbers import finite, fixed, percent, percent_apart, times
from yolo_compress.report.schema import (
    BenchRow,
    Check,
    Control,
    EvaluatedBenchRow,
    Gate,
    Judged,
    MeasuredBenchRow,
    Row,
    Tiers,
    Verdict,
)

# Tolerance for the rounding of one division: a row exactly on the bound passes, a row 1e-9 below it fails.
ROUNDING = 1e-12


def judge(
    rows: Sequence[BenchRow],
    min_retention: float,
    max_latency_ms: float | None = None,
    max_size_mib: float | None = None,
) -> Gate:
    """Judge the INT8 rows of the compressed model. If there are none, judge its float rows. The worst row decides.

    A row passes if its mAP50-95 is at least `min_retention` times the mAP50-95 of the baseline in FP32. A row with the mAP NaN
    fails. A row without mAP (None) is ignored. If the baseline has no usable mAP, every row fails. The worst row must also have the
    classes, input and output of the baseline. The limits on latency and size apply to the worst row that has a latency.

    Args:
        rows: Rows from `with_ids`. mAP may be NaN.
        min_retention: Least retention, 0 to 1.
        max_latency_ms: Limit of p50 latency. None: no limit. Files without an engine here ("untimed") have no latency.
        max_size_mib: Limit of the engine's size. None: no limit.

    Raises:
        RecipeError: `min_retention` is not a number from 0 to 1.
    """
    if not (math.isfinite(min_retention) and 0 <= min_retention <= 1):
        raise RecipeError(f"report.min_retention is {min_retention}, expected a number from 0 to 1")
    reference = reference_row(rows)
    compressed = [row for row in rows if row["model"] == "compressed"]
    int8 = [row for row in compressed if row["precision"] == "int8"]
    candidates = {row["id"]: row for row in int8 or compressed if has_accuracy(row)}
    gate: Gate = {
        "min_retention": min_retention,
        "max_latency_ms": max_latency_ms,
        "max_size_mib": max_size_mib,
        "reference": reference["id"] if reference else None,
        "judged": [_judge_row(row, reference, min_retention) for row in candidates.values()],
        "worst": None,
        "timed": None,
        "retention": None,
        "tiers": None,
        "checks": [],
        "passed": False,
        "reason": None,
    }
    if reference is None:
        gate["reason"] = "no FP32 row of the baseline was measured, so there is nothing to compare with"
    elif not candidates:
        gate["reason"] = f"no {'INT8 row' if int8 else 'row'} of the compressed model was measured"
    else:
        _decide(gate, candidates, reference)
    return gate


def _decide(gate: Gate, candidates: Mapping[str, EvaluatedBenchRow], reference: MeasuredBenchRow) -> None:
    """Set, in place, the keys of `gate` for the worst row, and the keys for the worst row with a latency."""
    worst = min(gate["judged"], key=_retention)
    timed = min(
        (one for one in gate["judged"] if candidates[one["id"]]["status"] == "ok"), key=_retention, default=None
    )
    row = candidates[worst["id"]]
    timed_row = candidates[timed["id"]] if timed else row
    gate["worst"], gate["timed"] = worst["id"], timed["id"] if timed else None
    gate["retention"], gate["tiers"] = worst["retention"], _tiers(worst["retention"])
    gate["checks"] = [
        *_check_limit(timed_row, "latency_p50_ms", "p50", "ms", "report.max_latency_ms", gate["max_latency_ms"]),
        *_check_limit(timed_row, "size_mib", "size", "MiB", "report.max_size_mib", gate["max_size_mib"]),
        *_check_signature(row, reference),
    ]
    reasons = [worst["reason"], *(check["reason"] for check in gate["checks"])]
    gate["passed"] = worst["passed"] and all(check["passed"] for check in gate["checks"])
    gate["reason"] = "; ".join(reason for reason in reasons if reason) or None


def _retention(entry: Judged) -> float:
    """Return the retention as a sort key. An unknown retention sorts below all others."""
    return -math.inf if entry["retention"] is None else entry["retention"]


def _tiers(retention: float | None) -> Tiers | None:
    if retention is None:
        return None
    return {
        "95": retention >= 0.95 - ROUNDING,
        "99": retention >= 0.99 - ROUNDING,
        "99.9": retention >= 0.999 - ROUNDING,
    }


def _check_limit(row: BenchRow, key: str, name: str, unit: str, knob: str, limit: float | None) -> list[Check]:
    """Check one measurement of the row, its latency or size, against the limit. If `limit` is None, return no check."""
    if limit is None:
        return []
    value = finite(row.get(key))
    passed = value is not None and value <= limit
    reason = f"{name} of {label(row)} was not measured, so {knob} cannot be met"
    if value is not None:
        reason = f"{name} of {label(row)} is {value:.4g} {unit}, above {knob}={limit:g}"
    return [{"name": name, "limit": limit, "value": value, "passed": passed, "reason": None if passed else reason}]


def _check_signature(row: EvaluatedBenchRow, reference: MeasuredBenchRow) -> list[Check]:
    """Check that a row has the classes, input and output of the baseline. If a row did not record them, return no check."""
    value, limit = row.get("signature"), reference.get("signature")
    if value is None or limit is None:
        return []
    given: Mapping[str, object] = value
    wrong = [f"{key} {given.get(key)}, not {expected}" for key, expected in limit.items() if given.get(key) != expected]
    reason = f"{label(row)} does not fit where the baseline does: {'; '.join(wrong)}" if wrong else None
    return [{"name": "signature", "limit": limit, "value": value, "passed": not wrong, "reason": reason}]


def _judge_row(row: EvaluatedBenchRow, reference: MeasuredBenchRow | None, min_retention: float) -> Judged:
    base = finite(reference["map50_95"]) if reference else None
    value = finite(row["map50_95"])
    entry: Judged = {"id": row["id"], "retention": None, "passed": False, "reason": None}
    if value is None:
        entry["reason"] = f"mAP50-95 of {label(row)} is not a number ({row['map50_95']})"
    elif isinstance(golden := row.get("golden"), Mapping) and golden.get("passed") is False:
        entry["reason"] = f"{label(row)} failed its golden self-test ({golden.get('reason') or 'see bench.py'})"
    elif reference is not None and base is None:
        entry["reason"] = f"the baseline's mAP50-95 is not a number ({reference['map50_95']})"
    elif base is not None and base <= 0:
        entry["reason"] = f"the baseline's mAP50-95 is {base:g}, so no share of it can be kept"
    elif base is not None:
        retention = value / base
        entry["retention"], entry["passed"] = retention, retention >= min_retention - ROUNDING
        if not entry["passed"]:
            share, bound = percent_apart(retention, min_retention)
            entry["reason"] = f"{label(row)} has {share}, below the gate of {bound}"
    return entry


def verdict(rows: Sequence[Row], gate: Gate, control: Control | None = None) -> Verdict:
    """Return the verdict on the worst row. It is the first line of the report as HTML, Markdown and text.

    Args:
        rows: Rows of the report.
        gate: Judgement on these rows.
        control: Comparison with the controls. The line names the best one.
    """
    status: Literal["pass", "fail"] = "pass" if gate["passed"] else "fail"
    if gate["retention"] is None or gate["worst"] is None or gate["reference"] is None:
        return {"status": status, "line": f"FAIL: {gate['reason']}", "row": gate["worst"]}
    by_id = {row["id"]: row for row in rows}
    row, reference = by_id[gate["worst"]], by_id[gate["reference"]]
    share, bound = percent(gate["retention"]), ""
    if gate["retention"] < gate["min_retention"] - ROUNDING:
        share, low = percent_apart(gate["retention"], gate["min_retention"])
        bound = f", below the gate of {low}"
    line = f"{status.upper()}: {label(row)} has {share} of the baseline's mAP50-95 "
    line += f"({fixed(reference['map50_95'])} -> {fixed(row['map50_95'])}){bound}"
    timed = by_id[gate["timed"]] if gate["timed"] else row
    gains = [gain(timed["speed_up"], "faster", "slower"), gain(timed["size_ratio"], "smaller", "larger")]
    if tail := ", ".join(text for text in gains if text):
        line += f"; {label(timed)} is {tail}" if timed is not row else f"{'; ' if bound else ', '}{tail}"
    if control and control["retention"] is not None:
        line += f"; {percent(control['retention'])} of the best control ({CONTROLS[control['best'] or '']})"
    line = "; ".join([line, *(check["reason"] for check in gate["checks"] if check["reason"])])
    return {"status": status, "line": line, "row": row["id"]}


def gain(ratio: float | None, better: str, worse: str) -> str:
    """Return a ratio as text, followed by the word `better`. If it is below 1, return its inverse, followed by `worse`.

    If `ratio` is None, return an empty text.
    """
    if ratio is None or ratio <= 0:
        return ""
    return f"{times(ratio)} {better}" if ratio >= 1 else f"{times(1 / ratio)} {worse}"
