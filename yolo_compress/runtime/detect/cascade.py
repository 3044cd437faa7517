"""A cascade of two engines: every image goes through the small model, and only some images also go through the large one.

A router decides by the small model's detections. It is a linear function of a few numbers (`FEATURES`), which estimates how much AP
an image gains from the large model. `yolo-compress cascade` fits it. The idea of a reward per image that is estimated from the local
detections is that of arXiv 2410.18919. The policy folder has `policy.json` and the folders of both engines. `open_engine` opens it,
and `Detector` runs it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .. import json_text
from ..backends.base import POLICY, EngineBackend, EngineInfo, load_info
from ..errors import EngineError
from ..registry import PRECISIONS

SCHEMA = 1
ROUTE_CONF = 0.05  # the router sees detections with a higher score; those below are mostly background
ROUTE_IOU, ROUTE_MAX_DET = 0.7, 300  # NMS of the detections that the router sees: the defaults of a deployment
SURE = 0.25  # score from which a deployment usually shows a detection
OVERLAP = 0.3  # IoU from which two remaining boxes compete for an object; NMS removes only those above 0.7
SEEN = 64  # the router looks at the best detections only, so that its time is limited
FEATURES = ("shown", "doubtful", "doubt", "mean_score", "mean_side", "least_side", "contested")


class Part(NamedTuple):
    """One of the two models of a policy. An engine of another runtime or version may replace its folder, but not of another model.

    Attributes:
        folder: name of the engine's folder in the policy folder.
        onnx_sha256: SHA-256 of the ONNX file that the engine is built from.
        imgsz: height and width of the input, px.
    """

    folder: str
    onnx_sha256: str
    precision: str
    imgsz: Tuple[int, int]


class Policy(NamedTuple):
    """A fitted router, and the two models that it was fitted to.

    Attributes:
        names: class names in the order of their index, equal for both models.
        weights_F: weight of each of `FEATURES`.
        bias: added to the weighted sum. The sum is the AP that the image is expected to gain.
        threshold: an image goes to the large model if the sum is above this.
    """

    small: Part
    large: Part
    names: Tuple[str, ...]
    weights_F: np.ndarray
    bias: float
    threshold: float

    def hands_over(self, detections_N6: np.ndarray, height: int, width: int) -> bool:
        """Return whether an image needs the large model. The arguments are those of `margin`."""
        return self.margin(detections_N6, height, width) > 0

    def margin(self, detections_N6: np.ndarray, height: int, width: int) -> float:
        """Return the expected gain of an image minus the threshold. Above 0, the image needs the large model.

        Args:
            detections_N6: the small model's detections by the router's settings, as `detector.routed` returns them.
            height, width: size of the image, px.
        """
        return self.margin_of(features(detections_N6, height, width))

    def margin_of(self, features_F: np.ndarray) -> float:
        """Return the margin of an image with these features."""
        return float(self.weights_F @ features_F + self.bias - self.threshold)


def features(detections_N6: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the values of `FEATURES` for an image, an (F,) float64 array. Without detections, all are 0 except the two sides, 1.

    Args:
        detections_N6: detections after NMS, columns x1, y1, x2, y2 in px, score, class; the highest score first.
        height, width: size of the image, px.

    The features are:
        shown: logarithm of 1 + the number of detections with a score of at least `SURE`.
        doubtful: logarithm of 1 + the number of the others.
        doubt: logarithm of 1 + the sum of 4 s (1 - s) over the scores s: detections near 0.5 count most.
        mean_score: mean score of the detections that are shown.
        mean_side, least_side: mean and least side of the boxes (root of the area), relative to the side of the image.
        contested: share of the detections that overlap another one, of any class, with an IoU above `OVERLAP`.
    """
    count = min(len(detections_N6), SEEN)
    if not count:
        return np.array([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    x1_N, y1_N, x2_N, y2_N, score_N = detections_N6[:SEEN, :5].T.astype(np.float64, order="C")
    shown = int(np.count_nonzero(score_N >= SURE))  # the first ones, since the scores fall
    area_N = np.maximum(x2_N - x1_N, 0.0) * np.maximum(y2_N - y1_N, 0.0)
    side_N = np.sqrt(area_N / (height * width))
    # One coordinate at a time: numpy is several times slower over an axis of two.
    shared_NN = np.maximum(np.minimum.outer(x2_N, x2_N) - np.maximum.outer(x1_N, x1_N), 0.0)
    shared_NN *= np.maximum(np.minimum.outer(y2_N, y2_N) - np.maximum.outer(y1_N, y1_N), 0.0)
    contested_NN = shared_NN > OVERLAP * (np.add.outer(area_N, area_N) - shared_NN)
    contested_NN.flat[:: count + 1] = False
    return np.array(
        [
            math.log1p(shown),
            math.log1p(count - shown),
            math.log1p((4 * score_N * (1 - score_N)).sum()),
            score_N[:shown].sum() / shown if shown else 0.0,
            side_N.sum() / count,
            side_N.min(),
            np.count_nonzero(contested_NN.any(axis=1)) / count,
        ]
    )


def read_policy(directory: Path) -> Policy:
    """Read `policy.json`, and check that its numbers are usable. The engines are not read.

    Raises:
        EngineError: the file cannot be read, is damaged, or is of another version.
    """
    file = directory / POLICY
    try:
        document = json_text.read(file)
        if document["schema"] != SCHEMA or document["features"] != list(FEATURES):
            raise ValueError(f"schema {document['schema']!r} with features {document['features']!r}")
        weights = [float(weight) for weight in document["weights"]]
        if len(weights) != len(FEATURES):
            raise ValueError(f"{len(weights)} weights for {len(FEATURES)} features")
        names = document["names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("names of text expected")
        small, large = (_part(document[key]) for key in ("small", "large"))
        if small.folder == large.folder:
            raise ValueError(f"small and large are both {small.folder!r}")
        bias, threshold = float(document["bias"]), float(document["threshold"])
        return Policy(small, large, tuple(names), np.array(weights), bias, threshold)
    except OSError as error:
        raise EngineError(f"{file}: {error.strerror}; run `yolo-compress cascade` again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(
            f"{file}: damaged or of another version ({error}); run `yolo-compress cascade` again"
        ) from error


def lower_precision(precisions: Sequence[str]) -> str:
    """Return the lower of the precisions of both models, by which the detections of a cascade are judged."""
    return max(precisions, key=PRECISIONS.index)  # type: ignore[arg-type]


def joined(small: EngineInfo, large: EngineInfo) -> EngineInfo:
    """Return the description of both engines as one, for the golden self-test: the SHA-256 of both ONNX files in one text."""
    precision = lower_precision([small.precision, large.precision])
    return replace(small, precision=precision, onnx_sha256=f"{small.onnx_sha256} {large.onnx_sha256}")


def _part(document: Any) -> Part:
    folder, (height, width) = document["folder"], document["imgsz"]
    if not isinstance(folder, str) or Path(folder).name != folder or folder in ("", ".", ".."):
        raise ValueError(f"folder {folder!r} leaves the policy folder")
    return Part(folder, str(document["onnx_sha256"]), str(document["precision"]), (int(height), int(width)))


def engines(directory: Path) -> Tuple[Policy, List[Tuple[Path, EngineInfo]]]:
    """Read a policy folder and check both engines' files. Return the policy, and folder and description of the small and large engine.

    Raises:
        EngineError: `read_policy` or `load_info` rejects a file, or an engine is not of the model that the policy was fitted to.
    """
    policy = read_policy(directory)
    found: List[Tuple[Path, EngineInfo]] = []
    for part in (policy.small, policy.large):
        path = directory / part.folder
        info = load_info(path)
        for what, theirs, ours in (
            ("classes", list(info.names), list(policy.names)),
            ("ONNX", info.onnx_sha256[:16], part.onnx_sha256[:16]),
            ("precision", info.precision, part.precision),
            ("imgsz", info.imgsz, part.imgsz),
        ):
            if theirs != ours:
                raise EngineError(
                    f"{path}: {what} {theirs}, but the policy was fitted to {ours}; run `yolo-compress cascade` for this engine"
                )
        found.append((path, info))
    return policy, found


class CascadeEngine:
    """The two opened engines of a policy, for a `Detector`. A cascade gives detections, so it has no output of its own.

    Args:
        small, large: the opened engines. Leaving the `with` block closes both.
    """

    def __init__(self, small: EngineBackend, large: EngineBackend, policy: Policy) -> None:
        self.small, self.large, self.policy = small, large, policy
        self.names, self.imgsz = small.names, small.imgsz
        self.channels, self.batch, self.needs_nms = small.channels, small.batch, small.needs_nms

    @property
    def precision(self) -> str:
        """The lower of the requested precisions of both engines."""
        return lower_precision([self.small.precision, self.large.precision])

    @property
    def executed(self) -> str:
        """The arithmetic of both engines, as text."""
        return f"{self.small.executed} then {self.large.executed}"

    @property
    def threads(self) -> Optional[int]:
        """Threads of one inference on a CPU. None: the small engine runs on a GPU."""
        return getattr(self.small, "threads", None)

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        """Raise EngineError."""
        raise _no_output()

    def bind(self, images_BCHW: np.ndarray) -> Callable[[], Any]:
        """Raise EngineError."""
        raise _no_output()

    def node_ms(self, runs: int) -> Dict[str, float]:
        """Raise EngineError."""
        raise _no_output()

    def __enter__(self) -> "CascadeEngine":
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self.small.__exit__(*exception)
        finally:
            self.large.__exit__(*exception)


def _no_output() -> EngineError:
    return EngineError("a cascade has no output of one engine; give it to Detector, or open its folder small or large")
