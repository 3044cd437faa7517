"""Verdict of a staged rollout: may more robots run the new model? The detections of two models on the same frames decide.

Model A is in use. Model B is the new model, the canary. A stage is the time in which a fixed share of the robots runs B
(`state.STAGES`). A look is one evaluation of the logs (`yolo-compress rollout`). A rule compares one quantity with its
budget, by a test that stays valid if repeated (`bets.py`). The verdict of a look is:

    abort    A rule is surely beyond its budget, or B is dead: A has as many frames and hours after B's last line as a stage needs.
    advance  Every rule is surely within its budget, on enough frames over enough time, and also in the later half of the frames.
    hold     Otherwise. Unknown is not a pass.

The error rates hold over all looks and stages of one release. A canary within all budgets is aborted with a probability of at most
`ALPHA`. A canary beyond a budget advances with a probability of at most `ALPHA`. Each stage, and the time after the last stage,
uses only its own frames and a fifth of `ALPHA`. For an abort, all rules together may use this fifth. For an advance, each rule may
use the whole fifth, because all rules must agree.

Time stamps come from the robot's clock, which may not be set yet at start-up. So time is counted from frame to frame, and a gap
counts as at most `PAUSE_S`. Frames with a time in the future are left out.

The error rates hold for the rules alone. They do not cover missing lines of B: a dead process, or a log of B that is much shorter
than A's. A canary that stops and restarts is held while it has no line for more than `MAX_SILENT` of A's frames.

The verdict cannot cover scenes that did not occur, such as night. If there are no labels (`truth`), the verdict does not cover objects
that both models miss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np

from yolo_compress.errors import DataError, RecipeError
from yolo_compress.rollout.bets import above, below, mean_bounds, quantile_bounds
from yolo_compress.rollout.schema import Document, Rule, Status
from yolo_compress.rollout.shadow_log import (
    MAX_APART_S,
    MAX_SKEW_S,
    Frame,
    Log,
    Pairs,
    matched,
    pair,
    partners,
    unscored,
)
from yolo_compress.rollout.state import STAGES, State, step

SCHEMA = 1
ALPHA = 0.05
SPACING_S = 1.0  # frames closer in time show the same scene, and are no further evidence
PAUSE_S = 60.0  # largest time that a gap counts: in a longer gap the robot was off, or its clock was set
MAX_AHEAD_S = 86400.0  # largest time by which the robot's clock may be ahead of this machine's


@dataclass(frozen=True)
class Budgets:
    """Limits for how much worse the canary B may be than model A, which is in use, and how much evidence is needed for a verdict.

    The latencies are percentiles over frames. The other quantities are means over frames.

    Compressed models on three small data sets (BCCD, NEU-DET, digits) were compared with their baselines
    (benchmarks/disagreement.py). `disagreement` was 0.07 to 0.17, `count` up to 0.08 and `score` up to 0.07. The defaults are above
    these values.

    Attributes:
        problems: Fraction of frames that only B could not process (`problem` in its log), minus the fraction that only A could not.
        disagreement: Fraction of the boxes of A and B that match no box of the other model: same class, IoU of at least 0.5.
        count: Difference of the numbers of boxes, as a fraction of the larger number.
        score: Difference between the scores of two boxes that match.
        p50_ratio, p99_ratio: End-to-end latency of B divided by the end-to-end latency of A.
        recall: Fraction of the labelled boxes that only A finds, minus the fraction that only B finds. It needs labels.
        frames: Smallest number of frames with detections of both models. Frames closer than `SPACING_S` are not counted.
        hours: Smallest time that these frames cover. A gap counts as at most a minute.
    """

    problems: float = 0.01
    disagreement: float = 0.2
    count: float = 0.1
    score: float = 0.1
    p50_ratio: float = 1.2
    p99_ratio: float = 1.5
    recall: float = 0.02
    frames: int = 500
    hours: float = 1.0


def budgets(text: str | None) -> Budgets:
    """Parse budgets such as `disagreement:0.3,p99_ratio:2`. Budgets that are not named keep their defaults.

    Raises:
        RecipeError: A name is unknown or repeated, or a value is out of range.
    """
    given: dict[str, Any] = {}
    names = [field.name for field in fields(Budgets)]
    for part in (text or "").split(",") if text else []:
        name, _, value = part.strip().partition(":")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        inside = (
            number >= 1 if name.endswith("_ratio") else number >= 0 if name in ("frames", "hours") else 0 < number < 1
        )
        if name not in names or name in given or not inside or not math.isfinite(number):
            raise RecipeError(
                f"command line: budgets: got {part.strip()!r}, expected NAME:NUMBER, where each NAME is given once and is one of "
                f"{', '.join(names)} (a ratio is at least 1, frames and hours at least 0, the others between 0 and 1)"
            )
        given[name] = int(number) if name == "frames" else number
    return replace(Budgets(), **given)


@dataclass(frozen=True)
class _Rule:
    """Result of one rule: the quantity, its interval (at the error level of an abort), and whether it is within the budget."""

    name: str
    value: float
    low: float
    high: float
    budget: float
    beyond: bool
    within: bool
    n: int


def judge(
    log_a: Log,
    log_b: Log,
    state: State,
    allowed: Budgets = Budgets(),
    truth: Mapping[str, np.ndarray] | None = None,
    cap: float = 1.0,
    now: float | None = None,
) -> tuple[Document, State]:
    """Decide from two shadow logs whether the release aborts, advances to more robots, or holds.

    Args:
        log_a: Log of model A, which is in use.
        log_b: Log of model B, the canary.
        state: State of the release before this evaluation.
        allowed: How much worse B may be, and how much evidence a stage needs.
        truth: Frame name -> ground-truth boxes: (N, 5) array, columns x1, y1, x2, y2 in px, class. None: there are no labels.
        cap: Largest fraction of the robots that may run B after this evaluation, 0 to 1.
        now: Unix time in seconds. None: this machine's clock.

    Returns:
        The document that `rollout` prints (NaN and infinity as null), and the new state of the release.

    Raises:
        DataError: The logs have no frame in common, were not written at the same time, or all frames of one are in the future.
        RecipeError: A and B are the same model, or are not the models of the state.
    """
    _check_models(log_a, log_b, state)
    now = time.time() if now is None else now
    log_a, ahead_a = _without_future(log_a, now)
    log_b, ahead_b = _without_future(log_b, now)
    if state.since > now + MAX_AHEAD_S:  # an earlier version used frames in the future as evidence
        state = replace(state, since=now)
    pairs = _paired(log_a, log_b)
    used = _spaced([match for match in pairs.frames if match[0].at > state.since])
    rules = _rules(used, allowed, truth)
    hours = _hours([a for a, _ in used])
    silent = _silent_share(log_a, pairs.frames, state.since)
    status, reasons = _verdict(rules, len(used), hours, silent, allowed)
    dead = _dead(log_a, max(log_b.frames[-1].at - pairs.skew_s, state.since), allowed)
    if dead:
        status, reasons = "abort", [*(reasons if status == "abort" else []), dead]
    after = step(state, status, used[-1][0].at if used else state.since, cap)
    if status == "advance" and after == state:
        done = "B runs on every robot already, and is within its budgets"
        status, reasons = "hold", [done if state.status == "done" else f"the next stage is above the cap of {cap:.0%}"]
    if state.status == "aborted":
        status, reasons = "abort", ["aborted before; start a new release with another version and another state file"]
    if ahead_a or ahead_b:
        reasons = [
            *reasons,
            f"{ahead_a} lines of A and {ahead_b} of B are in the future and left out: set the robot's clock",
        ]
    document: Document = {
        "schema": SCHEMA,
        "a": {"name": log_a.model[0], "version": log_a.model[1]},
        "b": {"name": log_b.model[0], "version": log_b.model[1]},
        "verdict": {"status": status, "reasons": reasons},
        "stage": STAGES[state.stage],
        "exposure": after.exposure,
        "release": after.status,
        "evidence": {
            "paired": len(pairs.frames),
            "used": len(used),
            "hours": round(hours, 3),
            "silent_b": round(silent, 4),
            "alone_a": pairs.alone_a,
            "alone_b": pairs.alone_b,
            "bad_lines": [log_a.bad, log_b.bad],
            "ahead": [ahead_a, ahead_b],
            "duplicates": [log_a.duplicates, log_b.duplicates],
            "skew_s": round(pairs.skew_s, 3),
        },
        "rules": [_rule_json(rule) for rule in rules],
        "settings": {"alpha": ALPHA, "stages": list(STAGES), "spacing_s": SPACING_S, "cap": cap, **asdict(allowed)},
    }
    return document, after


def _check_models(log_a: Log, log_b: Log, state: State) -> None:
    if log_a.model == log_b.model:
        name, version = log_a.model
        raise RecipeError(f"{log_a.path} and {log_b.path}: both are of {name} version {version}; A and B must differ")
    if (log_a.model, log_b.model) != (state.a, state.b):
        raise RecipeError(
            f"the logs are of {log_a.model} and {log_b.model}, but the release is of {state.a} and {state.b}; "
            "another release needs another state file"
        )


def _without_future(log: Log, now: float) -> tuple[Log, int]:
    """Return the log without frames in the future, and the number of frames that were left out."""
    frames = tuple(frame for frame in log.frames if frame.at <= now + MAX_AHEAD_S)
    if not frames:
        raise DataError(
            f"{log.path}: every line is in the future (this machine's clock says {time.strftime('%Y-%m-%d %H:%M', time.gmtime(now))} "
            "UTC); set the clock that is wrong, this machine's or the robot's"
        )
    return replace(log, frames=frames), len(log.frames) - len(frames)


def _hours(frames: Sequence[Frame]) -> float:
    """Return the hours that the frames cover. A gap counts as at most `PAUSE_S`."""
    gaps_s = (min(later.at - frame.at, PAUSE_S) for frame, later in pairwise(frames))
    return sum(gaps_s) / 3600


def _paired(log_a: Log, log_b: Log) -> Pairs:
    """Pair the frames of two shadow logs.

    Raises:
        DataError: The logs have no frame in common, or were not written at the same time.
    """
    pairs = pair(log_a.frames, log_b.frames)
    if abs(pairs.skew_s) > MAX_SKEW_S:
        raise DataError(
            f"{log_a.path} and {log_b.path}: B has the same frame names {round(abs(pairs.skew_s), 2)} s "
            f"{'later' if pairs.skew_s > 0 else 'earlier'} than A, at most {MAX_SKEW_S:g} s is allowed. The models did not run at the "
            "same time, or the names are frame numbers of processes that started at different times. Run both on one robot, with "
            "time stamps as frame names (ros2_node.py)"
        )
    if not pairs.frames:
        raise DataError(
            f"{log_a.path} and {log_b.path}: no frame in common ({len(log_a.frames)} and {len(log_b.frames)} frames); "
            f"both models must see the same frames within {MAX_APART_S:g} s"
        )
    return pairs


def _spaced(pairs: Sequence[tuple[Frame, Frame]]) -> list[tuple[Frame, Frame]]:
    """Return pairs that are at least `SPACING_S` apart. The choice depends on time alone, never on the detections."""
    chosen: list[tuple[Frame, Frame]] = []
    for match in pairs:
        if not chosen or match[0].at - chosen[-1][0].at >= SPACING_S:
            chosen.append(match)
    return chosen


def _silent_share(log_a: Log, pairs: Sequence[tuple[Frame, Frame]], since: float) -> float:
    """Return the fraction of A's frames for which B wrote no line. A dead canary cannot report a problem."""
    after = sum(frame.at > since for frame in log_a.frames)
    return 1 - sum(one.at > since for one, _ in pairs) / after if after else 0.0


def _dead(log_a: Log, last_b: float, allowed: Budgets) -> str | None:
    """Return the reason if B counts as dead, else None.

    B is dead if A's frames after B's last line would be enough evidence for a stage. With fewer frames, B's log may only be late.
    """
    lone = [a for a, _ in _spaced([(frame, frame) for frame in log_a.frames if frame.at > last_b + MAX_APART_S])]
    hours = _hours(lone)
    if len(lone) < max(allowed.frames, 1) or hours < allowed.hours:
        return None
    return (
        f"B has stopped: {len(lone)} frames of A over {hours:.2f} hours come after its last line, "
        f"{allowed.frames} over {allowed.hours:g} are enough"
    )


MAX_SILENT = 0.1  # below this, B's log may be late or the robot off; above it, the pairs are a biased sample


def _verdict(
    rules: Sequence[_Rule], used: int, hours: float, silent: float, allowed: Budgets
) -> tuple[Status, list[str]]:
    """Return the verdict and its reasons, from the results of the rules and the amount of evidence."""
    beyond = [f"{rule.name} is beyond {rule.budget:g}: {_interval(rule)}" for rule in rules if rule.beyond]
    if beyond:
        return "abort", beyond
    lacks = []
    if used < allowed.frames:
        lacks.append(f"{used} frames {SPACING_S:g} s apart, {allowed.frames} needed")
    if hours < allowed.hours:
        lacks.append(f"{hours:.2f} hours, {allowed.hours:g} needed")
    if silent > MAX_SILENT:
        lacks.append(f"B has no line for {silent:.0%} of A's frames, at most {MAX_SILENT:.0%} is allowed")
    lacks += [f"{rule.name} may be beyond {rule.budget:g}: {_interval(rule)}" for rule in rules if not rule.within]
    return ("hold", lacks) if lacks else ("advance", ["every rule is surely within its budget"])


def _interval(rule: _Rule) -> str:
    return f"{rule.value:.4g} in {rule.low:.4g} to {rule.high:.4g}, {rule.n} frames"


def _rules(
    used: Sequence[tuple[Frame, Frame]], allowed: Budgets, truth: Mapping[str, np.ndarray] | None
) -> list[_Rule]:
    """Return the results of all rules. `used` holds the paired frames of models A and B."""
    both = [(a, b) for a, b in used if a.problem is None and b.problem is None]
    paired = [partners(a, b) for a, b in both]
    signed: dict[str, list[float]] = {
        "problems": [float(b.problem is not None) - float(a.problem is not None) for a, b in used],
        "count": [count_shift(a, b) for a, b in both],
        "score": [score_shift(a, b, p) for (a, b), p in zip(both, paired, strict=True) if p],
    }
    one_sided = {"problems"}
    if truth is not None:
        labelled = [(a, b, truth[a.name]) for a, b in both if len(truth.get(a.name, ()))]
        signed["recall"] = [_recall(boxes, a) - _recall(boxes, b) for a, b, boxes in labelled]
        one_sided.add("recall")
    share = [disagreement(a, b, p) for (a, b), p in zip(both, paired, strict=True)]
    tests = 1 + 2 + sum(1 if name in one_sided else 2 for name in signed)
    within = ALPHA / (len(STAGES) + 1)
    beyond = within / tests
    rules = [_mean_rule("disagreement", np.array(share), (0.0, 1.0), allowed.disagreement, within, beyond, True)]
    for name, values in signed.items():
        budget = getattr(allowed, name)
        rules.append(_mean_rule(name, np.array(values), (-1.0, 1.0), budget, within, beyond, name in one_sided))
    ms_a, ms_b = (np.array([match[side].ms for match in both]) for side in (0, 1))
    for name, at in (("p50_ratio", 0.5), ("p99_ratio", 0.99)):
        rules.append(_quantile_rule(name, ms_a, ms_b, at, getattr(allowed, name), within, beyond))
    return rules


def disagreement(a: Frame, b: Frame, pairs: Sequence[tuple[int, int]]) -> float:
    """Return the fraction of all boxes in two frames that match no box of the other frame. `pairs` has the boxes that match."""
    boxes = len(a.boxes_N6) + len(b.boxes_N6)
    return 1 - 2 * len(pairs) / boxes if boxes else 0.0


def count_shift(a: Frame, b: Frame) -> float:
    """Return the number of boxes in frame `b` minus the number in frame `a`, as a fraction of the larger number."""
    most = max(len(a.boxes_N6), len(b.boxes_N6))
    return (len(b.boxes_N6) - len(a.boxes_N6)) / most if most else 0.0


def score_shift(a: Frame, b: Frame, pairs: Sequence[tuple[int, int]]) -> float:
    """Return the mean score difference, frame `b` minus frame `a`, over the boxes in `pairs`. `pairs` must not be empty."""
    return float(np.mean([b.boxes_N6[j, 4] - a.boxes_N6[i, 4] for i, j in pairs]))


def _recall(truth_N5: np.ndarray, frame: Frame) -> float:
    return len(matched(truth_N5, unscored(frame))) / len(truth_N5)


def _mean_rule(
    name: str,
    values_T: np.ndarray,
    span: tuple[float, float],
    budget: float,
    within: float,
    beyond: float,
    one_sided: bool,
) -> _Rule:
    """Return the result of the rule for a mean, which must be at most `budget`.

    If `one_sided` is False, the mean must also be at least -`budget`.
    """
    low, width = span[0], span[1] - span[0]
    unit_T = (values_T - low) / width
    upper, lower = (budget - low) / width, (-budget - low) / width
    bad = above(unit_T, upper, beyond)
    good = below(unit_T, upper, within)
    if not one_sided:
        bad = bad or above(1 - unit_T, 1 - lower, beyond)
        good = good and below(1 - unit_T, 1 - lower, within)
    least, most = mean_bounds(unit_T, beyond)
    value = float(values_T.mean()) if len(values_T) else math.nan
    lately = values_T[len(values_T) // 2 :]
    good = good and all(mean <= budget and (one_sided or mean >= -budget) for mean in (value, float(lately.mean())))
    return _Rule(name, value, low + width * least, low + width * most, budget, bad, good, len(values_T))


def _quantile_rule(
    name: str, ms_a: np.ndarray, ms_b: np.ndarray, share: float, budget: float, within: float, beyond: float
) -> _Rule:
    """Return the result of the rule for a latency ratio: a quantile of B's latency divided by the same quantile of A's.

    The bounds of A's quantile and of B's quantile use half of the error level each.
    """

    def ratio(level: float) -> tuple[float, float]:
        (low_a, high_a), (low_b, high_b) = (quantile_bounds(ms, share, level / 2) for ms in (ms_a, ms_b))
        return max(low_b, 0.0) / high_a if high_a > 0 else 0.0, high_b / low_a if low_a > 0 else math.inf

    low, high = ratio(beyond)
    quantile: Callable[[np.ndarray], float] = lambda ms: float(np.quantile(ms, share)) if len(ms) else math.nan  # noqa: E731
    value, lately = (
        quantile(ms_b[start:]) / of_a if (of_a := quantile(ms_a[start:])) > 0 else math.nan
        for start in (0, len(ms_a) // 2)
    )
    good = ratio(within)[1] <= budget and value <= budget and lately <= budget
    return _Rule(name, value, low, high, budget, low > budget, good, len(ms_a))


def _rule_json(rule: _Rule) -> Rule:
    value, low, high = (round(one, 6) if math.isfinite(one) else None for one in (rule.value, rule.low, rule.high))
    return {
        "name": rule.name,
        "value": value,
        "low": low,
        "high": high,
        "budget": rule.budget,
        "says": "beyond" if rule.beyond else "within" if rule.within else "open",
        "n": rule.n,
    }
