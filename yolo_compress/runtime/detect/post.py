"""From model output to detections: NMS within each class, with one or several labels per box. Results equal Ultralytics.

A model whose boxes need no NMS (YOLO26) has the IoU threshold `EVERY_BOX`. The best detections are then returned.

Shape suffixes: A anchors, C = 4 + classes, N detections, M candidates. A row of detections is x1, y1, x2, y2, score, class.
"""

from __future__ import annotations

from typing import List

import numpy as np

from ..errors import NotFinite
from .pre import Letterbox

MAX_CANDIDATES = 30000  # Ultralytics' max_nms
CLASS_OFFSET = 7680.0  # Ultralytics' max_wh: boxes of different classes are moved this far apart, in px
EVERY_BOX = 1.0  # IoU threshold that removes no box
BLOCK = 256  # candidates processed at a time; limits the IoU matrix to BLOCK x (selected boxes + BLOCK)


def nms(
    output_CA: np.ndarray, conf: float = 0.001, iou: float = 0.7, max_det: int = 300, multi_label: bool = True
) -> np.ndarray:
    """Apply non-maximum suppression to the output for one image.

    Args:
        output_CA: (4 + classes, anchors) array, rows centre x, centre y, width, height in letterboxed px, then class scores.
        conf: score threshold, 0 to 1. Every detection has a higher score.
        iou: IoU threshold, 0 to 1. A box is removed if its IoU with a better box of its class is above this threshold. With
            `EVERY_BOX` no box is removed, and no IoU is computed.
        max_det: largest number of detections. The best are returned.
        multi_label: True: a box may give detections of several classes, as in validation. False: only its best class.

    Returns:
        (N, 6) float32 array, columns x1, y1, x2, y2 in letterboxed px, score, class. The highest score comes first.

    Raises:
        ValueError: `output_CA` does not have two dimensions with at least one class.
        NotFinite: a coordinate, or the best score of an anchor, is NaN or infinite.
    """
    if output_CA.ndim != 2 or output_CA.shape[0] < 5:
        raise ValueError(f"nms takes one image's output [4 + classes, anchors], got {list(output_CA.shape)}")
    candidates_M6 = _candidates(output_CA.astype(np.float32, copy=False), conf, multi_label)
    order = np.argsort(-candidates_M6[:, 4], kind="stable")[:MAX_CANDIDATES]
    candidates_M6 = candidates_M6[order]
    if iou >= EVERY_BOX:
        return candidates_M6[:max_det]
    # float32 with the offset added, so that ties break as in torchvision.ops.nms on Ultralytics' shifted boxes
    shifted_M4 = candidates_M6[:, :4] + candidates_M6[:, 5:6] * np.float32(CLASS_OFFSET)
    return candidates_M6[_greedy(shifted_M4, iou, max_det)]


def _candidates(output_CA: np.ndarray, conf: float, multi_label: bool) -> np.ndarray:
    """Return rows (x1, y1, x2, y2, score, class) of all scores above `conf`, in the same order as Ultralytics."""
    best_A = output_CA[4:].max(axis=0)  # NaN if any score is NaN, so the scores need no separate check
    if not (np.isfinite(best_A).all() and np.isfinite(output_CA[:4]).all()):
        raise NotFinite("the model's output holds NaN or infinity")
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
    """Return the indices of the boxes that remain after greedy suppression.

    Boxes must be sorted, highest score first. They are processed in blocks. A set of boxes in a block is an int with one bit for
    each box.
    """
    selected: List[int] = []
    for start in range(0, len(boxes_M4), BLOCK):
        block_B4 = boxes_M4[start : start + BLOCK]
        suppressed = 0
        if selected:
            suppressed = _bits(np.any(_overlap(boxes_M4[selected], block_B4, iou), axis=0, keepdims=True))[0]
        for i, overlapped in enumerate(_bits(_overlap(block_B4, block_B4, iou))):
            if not suppressed >> i & 1:
                selected.append(start + i)
                suppressed |= overlapped
        if len(selected) >= max_det:
            break
    return selected[:max_det]


def _bits(sets_NB: np.ndarray) -> List[int]:
    """Convert each row of booleans to an int, with the first boolean in the lowest bit."""
    return [int.from_bytes(row.tobytes(), "little") for row in np.packbits(sets_NB, axis=1, bitorder="little")]


def _overlap(first_N4: np.ndarray, second_M4: np.ndarray, iou: float) -> np.ndarray:
    """Return a mask of the pairs whose IoU exceeds `iou`, with the same float32 operations as torchvision."""
    a, b = first_N4[:, None], second_M4[None]
    width = np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0])
    height = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1])
    inter = np.maximum(width, np.float32(0)) * np.maximum(height, np.float32(0))
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 for two boxes without area; they do not overlap
        return inter / (area_a + area_b - inter) > np.float64(iou)


def to_image(detections_N6: np.ndarray, placed: Letterbox) -> np.ndarray:
    """Convert detections from letterboxed px to px of the source image, clipped to it. Returns a new array."""
    out_N6 = detections_N6.astype(np.float32, copy=True)
    ratio_y, ratio_x = placed.ratio
    boxes_N4 = out_N6[:, :4]
    boxes_N4 -= np.array([placed.pad_left, placed.pad_top] * 2, np.float32)
    boxes_N4 /= np.array([ratio_x, ratio_y] * 2, np.float32)
    np.maximum(boxes_N4, np.float32(0), out=boxes_N4)
    np.minimum(boxes_N4, np.array([placed.width, placed.height] * 2, np.float32), out=boxes_N4)
    return out_N6
