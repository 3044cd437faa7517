"""A cascade of two engines: every image goes through the small model, and only some images also go through the large one.

A router decides by the small model's detections. It is a linear function of a few numbers (`FEATURES`), which estimates how much AP
an image gains from the large model. `yolo-compress cascade` fits it. The idea of a reward per image that is estimated from the local
detections is that of arXiv 2410.18919. The policy folder has `policy.json` and the folders of both engines. `open_engine` opens it,
and `Detector` runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from .. import json_text
from ..backends.base import POLICY, EngineBackend, EngineInfo, load_info
from ..errors import EngineError

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
        """Return whether an image needs the large model.

        Args:
            detections_N6: the small model's detections by the router's settings, as `detector.routed` returns them.
            height, width: size of the image, px.
        """
        return self.decides(features(detections_N6, height, width))

    def decides(self, features_F: np.ndarray) -> bool:
        """Return whether an image with these features needs the large model."""
        return bool(self.weights_F @ features_F + self.bias > self.threshold)


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
    rows_N6 = detections_N6[:SEEN].astype(np.float64)
    count = len(rows_N6)
    if not count:
        return np.array([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    score_N = rows_N6[:, 4]
    shown = int((score_N >= SURE).sum())
    sides_N2 = np.maximum(rows_N6[:, 2:4] - rows_N6[:, :2], 0.0)
    area_N = sides_N2[:, 0] * sides_N2[:, 1]
    side_N = np.sqrt(area_N / (height * width))
    low_NN2 = np.maximum(rows_N6[:, None, :2], rows_N6[None, :, :2])
    over_NN2 = np.maximum(np.minimum(rows_N6[:, None, 2:4], rows_N6[None, :, 2:4]) - low_NN2, 0.0)
    shared_NN = over_NN2[..., 0] * over_NN2[..., 1]
    contested_NN = shared_NN > OVERLAP * (area_N[:, None] + area_N - shared_NN)
    np.fill_diagonal(contested_NN, False)
    return np.array(
        [
            np.log1p(shown),
            np.log1p(count - shown),
            np.log1p((4 * score_N * (1 - score_N)).sum()),
            score_N[score_N >= SURE].mean() if shown else 0.0,
            side_N.mean(),
            side_N.min(),
            contested_NN.any(axis=1).mean(),
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
        """The requested precision of both engines, joined by " then " if they differ."""
        return " then ".join(dict.fromkeys([self.small.precision, self.large.precision]))

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
