"""Network output to detections: class-aware, multi-label NMS equal to Ultralytics' (torchvision's greedy rule).

Shape suffixes: A anchors, C = 4 + classes, N detections, M candidates; boxes xyxy. A detection row is
(x1, y1, x2, y2, score, class).
"""

from __future__ import annotations

import numpy as np

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
    scores_CA = output_CA[4:]
    anchors_K = np.flatnonzero(scores_CA.max(axis=0) > conf)
    xy_2K, half_2K = output_CA[:2, anchors_K], output_CA[2:4, anchors_K] / np.float32(2)
    boxes_K4 = np.concatenate([xy_2K - half_2K, xy_2K + half_2K]).T
    scores_KC = scores_CA[:, anchors_K].T
    if multi_label and scores_KC.shape[1] > 1:
        row, label = np.nonzero(scores_KC > conf)
    else:
        row, label = np.arange(len(anchors_K)), scores_KC.argmax(axis=1)
    return np.column_stack([boxes_K4[row], scores_KC[row, label], label.astype(np.float32)])


def _greedy(boxes_M4: np.ndarray, iou: float, max_det: int) -> np.ndarray:
    """Indices kept by greedy suppression of boxes that are sorted by falling score."""
    kept = np.empty(0, np.int64)
    for start in range(0, len(boxes_M4), BLOCK):
        block_B4 = boxes_M4[start : start + BLOCK]
        alive_B: np.ndarray = ~np.any(_overlap(boxes_M4[kept], block_B4, iou), axis=0)
        over_BB = _overlap(block_B4, block_B4, iou)
        for i in range(len(block_B4)):
            if alive_B[i]:
                alive_B[i + 1 :] &= ~over_BB[i, i + 1 :]
        kept = np.concatenate([kept, start + np.flatnonzero(alive_B)])
        if len(kept) >= max_det:
            break
    return kept[:max_det]


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
    out_N6[:, [0, 2]] = np.clip((out_N6[:, [0, 2]] - placed.pad_left) / ratio_x, 0, placed.width)
    out_N6[:, [1, 3]] = np.clip((out_N6[:, [1, 3]] - placed.pad_top) / ratio_y, 0, placed.height)
    return out_N6
