"""The golden self-test: compare an engine's detections in a few real images with the expected detections in the bundle.

The machine that made the bundle computed the expected detections with its own engines. `golden/golden.json` has the expected
detections, the tolerances and how they were measured. A detection and its partner in the other set have the same class and overlap
most (IoU of at least 0.5). Every detection above `conf`, expected or found, needs a partner. The partner's score may be as low as
`floor`. So a score near the threshold counts as a difference of scores, not as a missing box.

A cascade has golden images of its own. There, the router must also choose the expected model for every image.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, TypedDict

import numpy as np

from .. import json_text
from ..backends.base import Backend, EngineInfo
from ..detect.cascade import CascadeEngine
from ..detect.detector import Detector
from ..detect.pre import read_image
from ..errors import EngineError

FOLDER = "golden"
FILE = "golden.json"
SCHEMA = 1
SAME = "same"  # key of the tolerance for an engine with the same runtime, precision, version and arithmetic as the expected one
LEAST_IOU = 0.5
MOST = 90  # percent


class Difference(NamedTuple):
    """Differences in box and score between two sets of detections of the same images.

    Attributes:
        worst_box_px, worst_score: largest difference of a coordinate in px of the image, and of a score.
        most_box_px, most_score: 90th percentile of the differences. For INT8 the worst box says little, because rounding can
            decide which of two grid cells a box comes from.
        unmatched: boxes that match no box of the other set: same class, IoU of at least 0.5.
        compared: boxes that match a box of the other set.
    """

    worst_box_px: float
    worst_score: float
    most_box_px: float
    most_score: float
    unmatched: int
    compared: int


class Image(TypedDict):
    """File of a golden image in the bundle, and the name of the validation image that it was made from."""

    file: str  # .npy in `golden/`
    name: str  # name of the validation image


class EngineOf(TypedDict):
    """The engine that made the expected detections."""

    executed: str  # the arithmetic that the engine library chose, as text
    library: str  # version of the engine library; "none" if the file was executed node by node
    onnx_sha256: str  # of the ONNX file


class Tolerance(TypedDict):
    """Allowed difference from the expected detections."""

    of: str  # which figures of `Difference` are compared: "worst" or "most"
    box_px: float
    score: float
    unmatched: int  # boxes without a partner


class _OfCascade(TypedDict, total=False):
    handed: List[bool]  # of a cascade only: whether each image goes to the large model


class Golden(_OfCascade):
    """The document in golden.json."""

    schema: int
    conf: float  # a detection with at least this score needs a partner
    floor: float  # minimum score of a partner
    iou: float  # IoU threshold of NMS
    images: List[Image]
    boxes: int  # number of boxes above `conf` in all images
    engines: Dict[str, EngineOf]  # "runtime-precision" -> engine
    tolerances: Dict[str, Tolerance]  # precision, or `SAME` -> tolerance
    tolerances_from: str  # how the tolerances were measured
    images_measured: int  # number of images that they were measured on
    measured: Dict[str, Dict[str, float]]  # two engines, separated by a space -> their `Difference`
    expected: Dict[str, List[List[List[float]]]]  # "runtime-precision" -> image -> [x1, y1, x2, y2, score, class], px


class SelfTest(TypedDict):
    """Result of the golden self-test of one engine: the figures of `Difference`, and whether the engine passed."""

    worst_box_px: float
    worst_score: float
    most_box_px: float
    most_score: float
    unmatched: int
    compared: int
    passed: bool
    against: str  # "runtime-precision" of the engine that made the expected detections
    tolerance: Tolerance
    reason: Optional[str]  # why the test failed; null if it passed


def check(bundle: Path, backend: Backend, info: EngineInfo) -> SelfTest:
    """Compare an engine's detections in the golden images with the expected detections, and return the result.

    Args:
        bundle: directory of a bundle that `signed_manifest.verify` accepted. For a cascade: the folder `cascade` in it.
        backend: an opened engine or cascade. It is not closed.
        info: description of the engine. For a cascade: `cascade.joined` of both engines.

    Raises:
        EngineError: the bundle has no expected detections for this precision, or golden.json is malformed.
        NotFinite: the output holds NaN or infinity.
    """
    golden, images = load(bundle)
    own = f"{info.runtime}-{backend.precision}"
    try:
        expected = golden["expected"]
        against = (
            own
            if own in expected
            else next((key for key in sorted(expected) if key.endswith(own[len(info.runtime) :])), "")
        )
        if not against:
            raise EngineError(
                f"{bundle / FOLDER / FILE}: no expected detections for {backend.precision}, only for {sorted(expected)}"
            )
        # Other versions and processors have other kernels. INT8 boxes of ONNX Runtime 1.19 and 1.32 differ by several px.
        made = {"executed": backend.executed, "library": info.library, "onnx_sha256": info.onnx_sha256}
        same = against == own and golden["engines"][own] == made
        tolerance = golden["tolerances"][SAME if same else backend.precision]
        found = detections(backend, images, golden["floor"], golden["iou"])
        wanted = [np.array(rows, np.float64).reshape(-1, 6) for rows in expected[against]]
        worst = difference(wanted, found, golden["conf"])
        reason = beyond(worst, tolerance)
        if isinstance(backend, CascadeEngine):
            if len(golden["handed"]) != len(images):
                raise ValueError(f"{len(golden['handed'])} values in handed")
            other = sum(map(operator.ne, golden["handed"], _handed(backend, images)))
            reason = f"the router chooses the other model in {other} of {len(images)} images" if other else reason
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{bundle / FOLDER / FILE}: malformed ({error!r}); make the bundle again") from error
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
    """Read golden.json and the golden images, (H, W, 3) uint8 RGB arrays.

    Raises:
        EngineError: the bundle has no readable golden images, or golden.json has another schema.
    """
    file = bundle / FOLDER / FILE
    try:
        golden: Golden = json_text.read(file)
        if golden["schema"] != SCHEMA:
            raise EngineError(f"{file}: schema {golden['schema']!r}, expected {SCHEMA}; make the bundle again")
        images = [read_image(bundle / FOLDER / image["file"]) for image in golden["images"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{file}: cannot read the golden images ({error}); make the bundle again") from error
    return golden, images


def detections(backend: Backend, images: Sequence[np.ndarray], floor: float, iou: float) -> List[np.ndarray]:
    """Return the detections with scores above `floor`, with only the best class of each box, as in a deployment.

    The result has one (N, 6) array per image, columns x1, y1, x2, y2 in px, score, class.
    """
    return Detector(backend, floor, iou, multi_label=False).detect(images)


def _handed(backend: CascadeEngine, images: Sequence[np.ndarray]) -> List[bool]:
    """Return whether a cascade gives the large model's detections in each image."""
    detector = Detector(backend)
    return [detector.margin(image) > 0 for image in images]


def difference(expected: Sequence[np.ndarray], found: Sequence[np.ndarray], conf: float) -> Difference:
    """Return the differences in box and score between two sets of detections of the same images.

    Args:
        expected, found: one (N, 6) array per image, columns x1, y1, x2, y2 in px, score, class. The images have the same order.
        conf: every detection with at least this score must match a detection of the other set: same class, IoU of at least 0.5.
    """
    boxes, scores, unmatched = [0.0], [0.0], 0
    for one_N6, two_M6 in zip(expected, found):
        one, two = np.asarray(one_N6, np.float64), np.asarray(two_M6, np.float64)
        pairs = _pairs(one, two)
        for i, j in pairs:
            if max(one[i, 4], two[j, 4]) >= conf:
                boxes.append(float(np.abs(one[i, :4] - two[j, :4]).max()))
                scores.append(float(abs(one[i, 4] - two[j, 4])))
        for rows, paired in ((one, {i for i, _ in pairs}), (two, {j for _, j in pairs})):
            unmatched += sum(k not in paired and row[4] >= conf for k, row in enumerate(rows))
    most = [float(np.percentile(values[1:] or values, MOST)) for values in (boxes, scores)]
    return Difference(max(boxes), max(scores), most[0], most[1], int(unmatched), len(boxes) - 1)


def _pairs(one_N6: np.ndarray, two_M6: np.ndarray) -> List[Tuple[int, int]]:
    """Match boxes of the same class in two sets, by falling IoU. Return pairs of indices. Each box is in at most one pair."""
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


def beyond(found: Difference, tolerance: Tolerance) -> Optional[str]:
    """Return the figures that exceed the tolerance, as text. None: no figure does."""
    box, score = getattr(found, tolerance["of"] + "_box_px"), getattr(found, tolerance["of"] + "_score")
    worst = tolerance["of"] == "worst"
    figures = [
        f"{text.format(f'{got:.4g}')} ({allowed:.4g} allowed)"
        for text, got, allowed in (
            (
                "one box off by {} px" if worst else f"{100 - MOST} % of boxes off by {{}} px or more",
                box,
                tolerance["box_px"],
            ),
            (
                "one score off by {}" if worst else f"{100 - MOST} % of scores off by {{}} or more",
                score,
                tolerance["score"],
            ),
            ("boxes that only one of the two finds: {}", found.unmatched, tolerance["unmatched"]),
        )
        if got > allowed
    ]
    return "; ".join(figures) or None
