"""Network output to detections: class-aware, multi-label NMS equal to Ultralytics' (torchvision's greedy rule).

Shape suffixes: A anchors, C = 4 + classes, N detections, M candidates; boxes xyxy. A detection row is
(x1, y1, x2, y2, score, class).
"""

from __future__ import annotations

from typing import List

import numpy as np

from ..errors import NotFinite
from .pre import Letterbox

MAX_CANDIDATES = 30000  # Ultralytics' max_nms
CLASS_OFFSET = 7680.0  # Ultralytics' max_wh: boxes of different classes are moved this far apart, in px
BLOCK = 256  # candidates decided at a time; bounds the IoU matrix to BLOCK x (kept + BLOCK)


def nms(
    output_CA: np.ndarray, conf: float = 0.001, iou: float = 0.7, max_det: int = 300, multi_label: bool = True
) -> np.ndarray:
    """Keep the best box of each cluster.

    Args:
        output_CA: [4 + classes, anchors]: centre x, centre y, width, height in letterboxed px, then class scores.
        conf: scores must exceed this.
        iou: a box is dropped if it overlaps a better one of its class by more than this.
        max_det: detections kept, best first.
        multi_label: a box may count for several classes (as in validation), else its best only.

    Returns:
        detections_N6 float32 in letterboxed px, by falling score.

    Raises:
        ValueError: another shape.
        NotFinite: a coordinate, or the best score of an anchor, is NaN or infinite.
    """
    if output_CA.ndim != 2 or output_CA.shape[0] < 5:
        raise ValueError(f"nms takes one image's output [4 + classes, anchors], got {list(output_CA.shape)}")
    candidates_M6 = _candidates(output_CA.astype(np.float32, copy=False), conf, multi_label)
    order = np.argsort(-candidates_M6[:, 4], kind="stable")[:MAX_CANDIDATES]
    candidates_M6 = candidates_M6[order]
    # float32 with the offset added, so that ties break as in torchvision.ops.nms on Ultralytics' shifted boxes
    shifted_M4 = candidates_M6[:, :4] + candidates_M6[:, 5:6] * np.float32(CLASS_OFFSET)
    return candidates_M6[_greedy(shifted_M4, iou, max_det)]


def _candidates(output_CA: np.ndarray, conf: float, multi_label: bool) -> np.ndarray:
    """Rows (xyxy, score, class) of everything above `conf`, in the order in which Ultralytics lists them."""
    best_A = output_CA[4:].max(axis=0)  # NaN where any score is: the scores need no pass of their own
    if not (np.isfinite(best_A).all() and np.isfinite(output_CA[:4]).all()):
        raise NotFinite("the network's output holds NaN or infinity")
    chosen_CK = output_CA[:, np.flatnonzero(best_A > conf)]
    scores_KC = chosen_CK[4:].T
    if multi_label and scores_KC.shape[1] > 1:
        row, label = np.nonzero(scores_KC > conf)
    else:
        row, label = np.arange(len(scores_KC)), scores_KC.argmax(axis=1)
    xy_2M, half_2M = chosen_CK[:2, row], chosen_CK[2:4, row] / np.float32(2)
    candidates_M6 = np.empty((len(row), 6), np.float32)
    candidates_M6[:, :2], candidates_M6[:, 2:4] = (xy_2M - half_2M).T, (xy_2M + half_2M).T
    candidates_M6[:, 4], candidates_M6[:, 5] = scores_KC[row, label], label
    return candidates_M6


def _greedy(boxes_M4: np.ndarray, iou: float, max_det: int) -> List[int]:
    """Indices kept by greedy suppression of boxes that are sorted by falling score; sets of a block are bits of an int."""
    kept: List[int] = []
    for start in range(0, len(boxes_M4), BLOCK):
        block_B4 = boxes_M4[start : start + BLOCK]
        gone = 0
        if kept:
            gone = _bits(np.any(_overlap(boxes_M4[kept], block_B4, iou), axis=0, keepdims=True))[0]
        for i, over in enumerate(_bits(_overlap(block_B4, block_B4, iou))):
            if not gone >> i & 1:
                kept.append(start + i)
                gone |= over
        if len(kept) >= max_det:
            break
    return kept[:max_det]


def _bits(sets_NB: np.ndarray) -> List[int]:
    """Each row of booleans as an int, the first in the lowest bit."""
    return [int.from_bytes(row.tobytes(), "little") for row in np.packbits(sets_NB, axis=1, bitorder="little")]


def _overlap(first_N4: np.ndarray, second_M4: np.ndarray, iou: float) -> np.ndarray:
    """Whether intersection over union exceeds `iou`; same float32 operations as torchvision."""
    a, b = first_N4[:, None], second_M4[None]
    width = np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0])
    height = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1])
    inter = np.maximum(width, np.float32(0)) * np.maximum(height, np.float32(0))
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    with np.errstate(invalid="ignore", divide="ignore"):  # two boxes without area: 0 / 0 is no overlap
        return inter / (area_a + area_b - inter) > np.float64(iou)


def to_image(detections_N6: np.ndarray, placed: Letterbox) -> np.ndarray:
    """Detections in letterboxed px to px of the original image, clipped to it; a new array."""
    out_N6 = detections_N6.astype(np.float32, copy=True)
    ratio_y, ratio_x = placed.ratio
    boxes_N4 = out_N6[:, :4]
    boxes_N4 -= np.array([placed.pad_left, placed.pad_top] * 2, np.float32)
    boxes_N4 /= np.array([ratio_x, ratio_y] * 2, np.float32)
    np.maximum(boxes_N4, np.float32(0), out=boxes_N4)
    np.minimum(boxes_N4, np.array([placed.width, placed.height] * 2, np.float32), out=boxes_N4)
    return out_N6
