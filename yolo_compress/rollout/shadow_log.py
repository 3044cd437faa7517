"""Shadow logs: detections of two models that run on the same frames. `detect.py --shadow` writes one JSON line for each frame.

Model A is in use, and model B is the new model. A line is:

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
MAX_BAD_SHARE = (
    0.01  # fraction of the lines; more means another format or a broken disk, and the rest is a biased sample
)
MAX_SKEW_S = 1.0  # median of B's times minus A's; it is small because both run on one robot with one clock
MAX_APART_S = (
    1.0  # between the two times of one frame, after the skew is subtracted; a camera at 1 Hz has its next frame by then
)


LARGEST = 1e100  # limit of the numbers in a line, so that the area of a box is finite


class Frame(NamedTuple):
    """One line of a shadow log: frame name, Unix time in s, latency in ms, detections, problem.

    `boxes_N6` is an (N, 6) array with the columns x1, y1, x2, y2 in px, score, class.
    """

    name: str
    at: float
    ms: float
    boxes_N6: np.ndarray
    problem: str | None


@dataclass(frozen=True)
class Log:
    """A shadow log: model (name, version), frames in the order of time, and the numbers of bad and duplicate lines."""

    path: Path
    model: tuple[str, int]
    frames: tuple[Frame, ...]
    bad: int
    duplicates: int


def read(path: Path) -> Log:
    """Read a shadow log. Lines may be out of order or repeated.

    A last line without a newline is ignored, because it is still being written.

    Raises:
        DataError: The log has no line, too many bad lines, or lines of two models.
        StorageError: The file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    complete, _, _ = text.rpartition("\n")
    lines = [line for line in complete.split("\n") if line.strip()]
    frames: dict[tuple[str, float], Frame] = {}
    models: dict[tuple[str, int], int] = {}
    first_bad, bad, duplicates = "", 0, 0
    for number, line in enumerate(lines, 1):
        try:
            model, frame = _parsed(line)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            bad, first_bad = bad + 1, first_bad or f"line {number}: {error!r}"[:200]
            continue
        models.setdefault(model, number)
        duplicates += (frame.name, frame.at) in frames
        frames.setdefault((frame.name, frame.at), frame)
    if bad > MAX_BAD_SHARE * len(lines):
        raise DataError(
            f"{path}: {bad} of {len(lines)} lines are not shadow lines, at most {MAX_BAD_SHARE:.0%} is allowed; "
            f"the first: {first_bad}"
        )
    if not frames:
        raise DataError(f"{path}: no shadow line; detect.py --shadow FILE writes them")
    if len(models) > 1:
        words = ", ".join(f"{name} version {version} (line {number})" for (name, version), number in models.items())
        raise DataError(f"{path}: lines of more than one model: {words}; each model needs a file")
    return Log(path, next(iter(models)), tuple(sorted(frames.values(), key=lambda f: f.at)), bad, duplicates)


def _parsed(line: str) -> tuple[tuple[str, int], Frame]:
    entry = json.loads(line, parse_constant=_no_constant)
    if entry["schema"] != SCHEMA:
        raise ValueError(f"schema {entry['schema']!r}, expected {SCHEMA}")
    name, version, frame, problem = entry["model"]["name"], entry["model"]["version"], entry["frame"], entry["problem"]
    at, ms = _number(entry["at"]), _number(entry["ms"])
    if not (
        isinstance(name, str) and name.isprintable() and type(version) is int and isinstance(frame, str) and ms >= 0
    ):
        raise ValueError("model, frame or ms has a wrong value")
    if not (problem is None or isinstance(problem, str)):
        raise ValueError("problem is neither null nor text")
    return (name, version), Frame(frame, at, ms, _boxes(entry["detections"], 6), problem)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:  # also false for NaN
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a finite number")


def _boxes(rows: Any, columns: int) -> np.ndarray:
    """Check rows of x1, y1, x2, y2, [score,] class, and return them as an array [N, columns].

    Raises:
        ValueError: A row has another length, a box is inverted, or a score or class is out of range.
    """
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == columns for row in rows):
        raise ValueError(f"detections: rows of {columns} expected")
    boxes = np.array([[_number(value) for value in row] for row in rows], np.float64).reshape(-1, columns)
    upright = (boxes[:, 2:4] >= boxes[:, :2]).all()
    classes = boxes[:, -1]
    scored = columns == 5 or ((boxes[:, 4] >= 0) & (boxes[:, 4] <= 1)).all()
    if not (upright and scored and (classes >= 0).all() and (classes == np.floor(classes)).all()):
        raise ValueError("a box has x2 < x1 or y2 < y1, a score outside 0..1, or a class that is not an index")
    return boxes


def read_truth(path: Path) -> dict[str, np.ndarray]:
    """Read ground-truth boxes. Return frame name -> boxes_N5, an (N, 5) array with the columns x1, y1, x2, y2 in px, class.

    Each line of the file is {"frame": name, "boxes": [[x1, y1, x2, y2, class], ...]}.

    Raises:
        DataError: A line is invalid, or a frame is repeated.
        StorageError: The file cannot be read.
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
            raise DataError(f"{path}:{number}: not a label line ({error!r})") from error
        if name in truth:
            raise DataError(f"{path}:{number}: frame {name!r} is repeated")
        truth[name] = boxes_N5
    return truth


@dataclass(frozen=True)
class Pairs:
    """Paired frames of models A and B in the order of A's time. Also the numbers of unpaired frames, and B's median lag in s."""

    frames: tuple[tuple[Frame, Frame], ...]
    alone_a: int
    alone_b: int
    skew_s: float


def pair(frames_a: Sequence[Frame], frames_b: Sequence[Frame]) -> Pairs:
    """Pair the frames of two logs by name, and by time if a name is repeated because a camera was restarted.

    B's lag is the median time difference over the names that occur once. After the lag is subtracted, the times of a pair may
    differ by up to `MAX_APART_S`. The caller must check the lag against `MAX_SKEW_S`: equal names may be a coincidence.
    """
    by_name: dict[str, tuple[list[Frame], list[Frame]]] = defaultdict(lambda: ([], []))
    for side, frames in enumerate((frames_a, frames_b)):
        for frame in frames:
            by_name[frame.name][side].append(frame)
    once = [b[0].at - a[0].at for a, b in by_name.values() if len(a) == len(b) == 1]
    skew_s = median(once) if once else 0.0
    pairs = [match for a, b in by_name.values() for match in _nearest(a, b, skew_s)]
    pairs.sort(key=lambda match: match[0].at)
    return Pairs(tuple(pairs), len(frames_a) - len(pairs), len(frames_b) - len(pairs), skew_s)


def _nearest(a: list[Frame], b: list[Frame], skew_s: float) -> list[tuple[Frame, Frame]]:
    """Pair each frame of A with the nearest unused frame of B. All frames have the same name."""
    left = sorted(b, key=lambda frame: frame.at)
    times = [frame.at - skew_s for frame in left]
    pairs = []
    for one in sorted(a, key=lambda frame: frame.at):
        place = bisect_left(times, one.at)
        near = [i for i in (place - 1, place) if 0 <= i < len(left) and abs(times[i] - one.at) <= MAX_APART_S]
        if near:
            nearest = min(near, key=lambda i: abs(times[i] - one.at))
            del times[nearest]
            pairs.append((one, left.pop(nearest)))
    return pairs


def unscored(frame: Frame) -> np.ndarray:
    """Return the boxes of a frame without scores: (N, 5) array, columns x1, y1, x2, y2 in px, class."""
    boxes_N5: np.ndarray = frame.boxes_N6[:, [0, 1, 2, 3, 5]]
    return boxes_N5


def partners(a: Frame, b: Frame) -> list[tuple[int, int]]:
    """Return the boxes of two frames that match (same class, IoU of at least 0.5), as pairs of indices."""
    return matched(unscored(a), unscored(b))


def matched(one_N5: np.ndarray, two_M5: np.ndarray, least_iou: float = 0.5) -> list[tuple[int, int]]:
    """Match boxes of two sets that have the same class and an IoU of at least `least_iou`. Return pairs of indices.

    The pair with the largest IoU is matched first. Each box is in at most one pair. The last column of both arrays is the class.
    """
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
