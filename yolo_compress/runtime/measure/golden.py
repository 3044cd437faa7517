"""The golden self-test: a few real images, and what the workstation's engines detected in them.

`golden/golden.json` says what is expected, within which tolerances, and where those come from. A detection is compared with the one
of its class that overlaps it most (IoU of 0.5 at least); whatever one side has above `conf` needs a partner on the other, which may
lie as low as `floor`, so that a score near the threshold is a difference of scores and not a missing box.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, TypedDict

import numpy as np

from .. import json_text
from ..backends.base import Backend
from ..detect.detector import Detector
from ..detect.pre import read_image
from ..errors import EngineError

FOLDER = "golden"
FILE = "golden.json"
SCHEMA = 1
SAME = "same"  # the tolerance of an engine of the runtime and precision that the expectation is of
LEAST_IOU = 0.5
MOST = 90  # percent


class Difference(NamedTuple):
    """Of two sets of detections: px of the image, score, boxes without partner, boxes with one.

    `most_`: nine of ten boxes differ by less. With coarse arithmetic the worst one says little: a rounding decides from which of
    two cells a box comes.
    """

    worst_box_px: float
    worst_score: float
    most_box_px: float
    most_score: float
    unmatched: int
    compared: int


class Image(TypedDict):
    """A golden image."""

    file: str  # .npy in `golden/`
    name: str  # of the validation image


class EngineOf(TypedDict):
    """The engine that an expectation is of."""

    executed: str  # the arithmetic that its library chose, in words
    library: str  # its version; "none" where the file was evaluated node by node


class Tolerance(TypedDict):
    """How far a robot may be off."""

    of: str  # which of `Difference`'s figures count: "worst" or "most"
    box_px: float
    score: float
    unmatched: int  # boxes without partner


class Golden(TypedDict):
    """golden.json."""

    schema: int
    conf: float  # score that a detection of one side needs to have a partner on the other
    floor: float  # the least score of such a partner
    iou: float  # of NMS
    images: List[Image]
    boxes: int  # above `conf` in all images
    engines: Dict[str, EngineOf]  # "runtime-precision" ->
    tolerances: Dict[str, Tolerance]  # precision, or `SAME` ->
    tolerances_from: str  # how they were found
    images_measured: int  # that they were found on
    measured: Dict[str, Dict[str, float]]  # two engines, separated by a space -> their `Difference`
    expected: Dict[str, List[List[List[float]]]]  # "runtime-precision" -> image -> [x1, y1, x2, y2, score, class], px


class SelfTest(TypedDict):
    """What the self-test finds of one engine: `Difference`, and the verdict."""

    worst_box_px: float
    worst_score: float
    most_box_px: float
    most_score: float
    unmatched: int
    compared: int
    passed: bool
    against: str  # "runtime-precision" of the expectation
    tolerance: Tolerance
    reason: Optional[str]  # null where it passed


def check(bundle: Path, backend: Backend, runtime: str, library: str) -> SelfTest:
    """Run the golden images through an engine and compare.

    Args:
        bundle: directory of a bundle that `seal.verify` has seen.
        backend: an opened engine; stays open.
        runtime, library: its runtime, and the version of the library.

    Raises:
        EngineError: the bundle expects nothing of this precision, or its golden.json is of another form.
        NotFinite: NaN in the output.
    """
    golden, images = load(bundle)
    own = f"{runtime}-{backend.precision}"
    try:
        expected = golden["expected"]
        against = (
            own if own in expected else next((key for key in sorted(expected) if key.endswith(own[len(runtime) :])), "")
        )
        if not against:
            raise EngineError(
                f"{bundle / FOLDER / FILE}: expects nothing of {backend.precision}; it has {sorted(expected)}"
            )
        # another version or processor has other kernels, and INT8 boxes of ONNX Runtime 1.19 are pixels from those of 1.32
        same = against == own and golden["engines"][own] == {"executed": backend.executed, "library": library}
        tolerance = golden["tolerances"][SAME if same else backend.precision]
        found = detections(backend, images, golden["floor"], golden["iou"])
        wanted = [np.array(rows, np.float64).reshape(-1, 6) for rows in expected[against]]
        worst = difference(wanted, found, golden["conf"])
        reason = _reason(worst, tolerance)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{bundle / FOLDER / FILE}: of another form ({error!r}); make the bundle again") from error
    return {
        "worst_box_px": worst.worst_box_px,
        "worst_score": worst.worst_score,
        "most_box_px": worst.most_box_px,
        "most_score": worst.most_score,
        "unmatched": worst.unmatched,
        "compared": worst.compared,
        "passed": reason is None,
        "against": against,
        "tolerance": tolerance,
        "reason": reason,
    }


def load(bundle: Path) -> Tuple[Golden, List[np.ndarray]]:
    """golden.json, and the images as uint8 RGB, images_HW3.

    Raises:
        EngineError: the bundle has none, or of another schema.
    """
    file = bundle / FOLDER / FILE
    try:
        golden: Golden = json_text.read(file)
        if golden["schema"] != SCHEMA:
            raise EngineError(f"{file}: schema {golden['schema']!r}, {SCHEMA} expected; make the bundle again")
        images = [read_image(bundle / FOLDER / image["file"]) for image in golden["images"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{file}: no golden images to be read ({error}); make the bundle again") from error
    return golden, images


def detections(backend: Backend, images: Sequence[np.ndarray], floor: float, iou: float) -> List[np.ndarray]:
    """As a deployment has them: each box of its best class alone, from `floor` on; N6 an image."""
    return Detector(backend, floor, iou, multi_label=False).detect(images)


def difference(expected: Sequence[np.ndarray], found: Sequence[np.ndarray], conf: float) -> Difference:
    """The largest differences over all images; N6 (xyxy, score, class) an image, in the same order."""
    boxes, scores, unmatched = [0.0], [0.0], 0
    for one_N6, two_M6 in zip(expected, found):
        one, two = np.asarray(one_N6, np.float64), np.asarray(two_M6, np.float64)
        pairs = _pairs(one, two)
        for i, j in pairs:
            if max(one[i, 4], two[j, 4]) >= conf:
                boxes.append(float(np.abs(one[i, :4] - two[j, :4]).max()))
                scores.append(float(abs(one[i, 4] - two[j, 4])))
        for rows, taken in ((one, {i for i, _ in pairs}), (two, {j for _, j in pairs})):
            unmatched += sum(k not in taken and row[4] >= conf for k, row in enumerate(rows))
    most = [float(np.percentile(values[1:] or values, MOST)) for values in (boxes, scores)]
    return Difference(max(boxes), max(scores), most[0], most[1], int(unmatched), len(boxes) - 1)


def _pairs(one_N6: np.ndarray, two_M6: np.ndarray) -> List[Tuple[int, int]]:
    """Partners of one class, the largest overlap first."""
    if not len(one_N6) or not len(two_M6):
        return []
    a, b = one_N6[:, None], two_M6[None]
    sides = [np.minimum(a[..., k + 2], b[..., k + 2]) - np.maximum(a[..., k], b[..., k]) for k in (0, 1)]
    shared = np.maximum(sides[0], 0) * np.maximum(sides[1], 0)
    areas = [(rows[..., 2] - rows[..., 0]) * (rows[..., 3] - rows[..., 1]) for rows in (a, b)]
    iou_NM = np.where(a[..., 5] == b[..., 5], shared / np.maximum(areas[0] + areas[1] - shared, 1e-9), 0.0)
    order = np.argsort(-iou_NM, axis=None, kind="stable")
    pairs: List[Tuple[int, int]] = []
    left, right = set(), set()
    for flat in order[: int((iou_NM >= LEAST_IOU).sum())].tolist():
        i, j = divmod(flat, len(two_M6))
        if i not in left and j not in right:
            pairs.append((i, j))
            left.add(i)
            right.add(j)
    return pairs


def _reason(found: Difference, tolerance: Tolerance) -> Optional[str]:
    """What is beyond its tolerance, in words."""
    box, score = getattr(found, tolerance["of"] + "_box_px"), getattr(found, tolerance["of"] + "_score")
    beyond = [
        f"{what} {got:.4g}, {allowed:.4g} allowed"
        for what, got, allowed in (
            (f"{tolerance['of']} boxes off by px:", box, tolerance["box_px"]),
            (f"{tolerance['of']} scores off by", score, tolerance["score"]),
            ("boxes without partner:", found.unmatched, tolerance["unmatched"]),
        )
        if got > allowed
    ]
    return "; ".join(beyond) or None
