"""Shadow logs: what two models, running beside each other, said of the same frames. A JSON line a frame, by `detect.py --shadow`.

{"schema": 1, "frame": name, "at": unix seconds, "model": {"name", "version"}, "ms": end to end,
 "detections": [[x1, y1, x2, y2, score, class], ...], "problem": null or text}
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from yolo_compress.errors import DataError, StorageError

SCHEMA = 1
MAX_BAD_SHARE = 0.01  # of the lines; more is another format or a broken disk, and what is left is no fair sample
MAX_SKEW_S = 1.0  # B's times after A's, in the middle: both run on one robot, by one clock
MAX_APART_S = 1.0  # between the two times of one frame, less the skew; a camera at 1 Hz shows another scene by then


LARGEST = 1e100  # of a number in a line: an area of boxes is a number still


class Frame(NamedTuple):
    """A line. boxes_N6 (x1, y1, x2, y2 px, score, class)."""

    name: str
    at: float
    ms: float
    boxes_N6: np.ndarray
    problem: str | None


@dataclass(frozen=True)
class Log:
    """A file: its one model, its frames by time, and what was left out of it."""

    path: Path
    model: tuple[str, int]
    frames: tuple[Frame, ...]
    bad: int
    duplicates: int


def read(path: Path) -> Log:
    """Reads a log. Lines may be out of order and twice; a last line that is still being written is left for the next time.

    Raises:
        DataError: no line, too many bad ones, or lines of two models.
        StorageError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    whole, _, _ = text.rpartition("\n")
    lines = [line for line in whole.split("\n") if line.strip()]
    found: dict[tuple[str, float], Frame] = {}
    models: dict[tuple[str, int], int] = {}
    first_bad, bad, duplicates = "", 0, 0
    for number, line in enumerate(lines, 1):
        try:
            model, frame = _parsed(line)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            bad, first_bad = bad + 1, first_bad or f"line {number}: {error!r}"[:200]
            continue
        models.setdefault(model, number)
        duplicates += (frame.name, frame.at) in found
        found.setdefault((frame.name, frame.at), frame)
    if bad > MAX_BAD_SHARE * len(lines):
        raise DataError(
            f"{path}: {bad} of {len(lines)} lines are no shadow lines, {MAX_BAD_SHARE:.0%} may be; the first: {first_bad}"
        )
    if not found:
        raise DataError(f"{path}: holds no shadow line; detect.py --shadow FILE writes them")
    if len(models) > 1:
        words = ", ".join(f"{name} version {version} (line {number})" for (name, version), number in models.items())
        raise DataError(f"{path}: lines of more than one model: {words}; a file a model")
    return Log(path, next(iter(models)), tuple(sorted(found.values(), key=lambda f: f.at)), bad, duplicates)


def _parsed(line: str) -> tuple[tuple[str, int], Frame]:
    entry = json.loads(line, parse_constant=_no_constant)
    if entry["schema"] != SCHEMA:
        raise ValueError(f"schema {entry['schema']!r}, {SCHEMA} expected")
    name, version, frame, problem = entry["model"]["name"], entry["model"]["version"], entry["frame"], entry["problem"]
    at, ms = _number(entry["at"]), _number(entry["ms"])
    if not (
        isinstance(name, str) and name.isprintable() and type(version) is int and isinstance(frame, str) and ms >= 0
    ):
        raise ValueError("model, frame or ms is not as it should be")
    if not (problem is None or isinstance(problem, str)):
        raise ValueError("problem is neither null nor text")
    return (name, version), Frame(frame, at, ms, _boxes(entry["detections"], 6), problem)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:  # NaN neither
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _boxes(rows: Any, columns: int) -> np.ndarray:
    """Rows x1, y1, x2, y2, [score,] class, looked at."""
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == columns for row in rows):
        raise ValueError(f"detections: rows of {columns} expected")
    boxes = np.array([[_number(value) for value in row] for row in rows], np.float64).reshape(-1, columns)
    upright = (boxes[:, 2:4] >= boxes[:, :2]).all()
    classes = boxes[:, -1]
    scored = columns == 5 or ((boxes[:, 4] >= 0) & (boxes[:, 4] <= 1)).all()
    if not (upright and scored and (classes >= 0).all() and (classes == np.floor(classes)).all()):
        raise ValueError("a box with x2 < x1, a score outside 0..1, or a class that is no index")
    return boxes


def read_truth(path: Path) -> dict[str, np.ndarray]:
    """Labels: frame name to boxes_N5 (x1, y1, x2, y2 px, class), of lines {"frame": name, "boxes": [[...], ...]}.

    Raises:
        DataError: a line that is none, or a frame twice.
        StorageError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from error
    truth: dict[str, np.ndarray] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line, parse_constant=_no_constant)
            name, boxes_N5 = str(entry["frame"]), _boxes(entry["boxes"], 5)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path}:{number}: no label line ({error!r})") from error
        if name in truth:
            raise DataError(f"{path}:{number}: frame {name!r} is there twice")
        truth[name] = boxes_N5
    return truth


@dataclass(frozen=True)
class Pairs:
    """The frames that both models saw beside each other, by A's time, and what had no partner."""

    frames: tuple[tuple[Frame, Frame], ...]
    alone_a: int
    alone_b: int
    skew_s: float


def pair(frames_a: Sequence[Frame], frames_b: Sequence[Frame]) -> Pairs:
    """Pairs frames by name and, where a name comes more than once (a camera that was restarted), by time.

    B's lag is the median difference over the names that are there once; less it, partners may be `MAX_APART_S` apart. Whether the lag
    is one that two models beside each other can have (`MAX_SKEW_S`) is for the caller to ask: names may be alike without it.
    """
    by_name: dict[str, tuple[list[Frame], list[Frame]]] = defaultdict(lambda: ([], []))
    for side, frames in enumerate((frames_a, frames_b)):
        for frame in frames:
            by_name[frame.name][side].append(frame)
    once = [b[0].at - a[0].at for a, b in by_name.values() if len(a) == len(b) == 1]
    skew_s = median(once) if once else 0.0
    found = [match for a, b in by_name.values() for match in _nearest(a, b, skew_s)]
    found.sort(key=lambda match: match[0].at)
    return Pairs(tuple(found), len(frames_a) - len(found), len(frames_b) - len(found), skew_s)


def _nearest(a: list[Frame], b: list[Frame], skew_s: float) -> list[tuple[Frame, Frame]]:
    """Of one name, each of A with the nearest of B that is left."""
    left = sorted(b, key=lambda frame: frame.at)
    times = [frame.at - skew_s for frame in left]
    found = []
    for one in sorted(a, key=lambda frame: frame.at):
        place = bisect_left(times, one.at)
        near = [i for i in (place - 1, place) if 0 <= i < len(left) and abs(times[i] - one.at) <= MAX_APART_S]
        if near:
            nearest = min(near, key=lambda i: abs(times[i] - one.at))
            del times[nearest]
            found.append((one, left.pop(nearest)))
    return found


def unscored(frame: Frame) -> np.ndarray:
    """boxes_N5 (x1, y1, x2, y2 px, class)."""
    boxes_N5: np.ndarray = frame.boxes_N6[:, [0, 1, 2, 3, 5]]
    return boxes_N5


def partners(a: Frame, b: Frame) -> list[tuple[int, int]]:
    """Indices of the boxes of two frames that are of one class and overlap by half at least."""
    return matched(unscored(a), unscored(b))


def matched(one_N5: np.ndarray, two_M5: np.ndarray, least_iou: float = 0.5) -> list[tuple[int, int]]:
    """Partners of one class by overlap, the largest first; the last column is the class."""
    if not len(one_N5) or not len(two_M5):
        return []
    low_NM2 = np.maximum(one_N5[:, None, :2], two_M5[None, :, :2])
    high_NM2 = np.minimum(one_N5[:, None, 2:4], two_M5[None, :, 2:4])
    shared_NM = np.prod(np.maximum(high_NM2 - low_NM2, 0), axis=2)
    area_N, area_M = (np.prod(boxes[:, 2:4] - boxes[:, :2], axis=1) for boxes in (one_N5, two_M5))
    iou_NM = shared_NM / np.maximum(area_N[:, None] + area_M[None] - shared_NM, 1e-9)
    iou_NM[one_N5[:, None, -1] != two_M5[None, :, -1]] = 0
    pairs: list[tuple[int, int]] = []
    while iou_NM.size and iou_NM.max() >= least_iou:
        i, j = (int(k) for k in np.unravel_index(iou_NM.argmax(), iou_NM.shape))
        pairs.append((i, j))
        iou_NM[i], iou_NM[:, j] = 0, 0
    return pairs
