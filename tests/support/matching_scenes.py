"""Scenes of labels and detections for tests of matching and mAP, and their precision by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from yolo_compress.runtime.max_detections import MAX_DETECTIONS
from yolo_compress.runtime.measure.coco_map import AREAS

NAMES = ("bolt", "nut", "screw")
SIDE = 300.0  # px of the test images

Scene = tuple[list[np.ndarray], list[np.ndarray]]


def by_pycocotools(truths: list[np.ndarray], found: list[np.ndarray], classes: int) -> np.ndarray:
    """Return precision_TRKA of pycocotools. Its -1, for classes without labels in the size range, becomes NaN."""
    from pycocotools.cocoeval import COCOeval

    rows = [np.column_stack([truth[:, 1:], np.ones(len(truth)), truth[:, 0]]) for truth in truths]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(as_coco(rows, classes), as_coco(found, classes), "bbox")
        assert evaluation.params.areaRngLbl == list(AREAS)
        assert evaluation.params.areaRng == [list(bounds) for bounds in AREAS.values()]
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
    values = np.asarray(evaluation.eval["precision"])[..., 0]
    return np.where(values > -1, values, np.nan)


def as_coco(rows: Sequence[np.ndarray], classes: int) -> Any:
    """Make pycocotools' COCO object of the rows (xyxy, score, class) of each image."""
    from pycocotools.coco import COCO

    annotations: list[dict[str, object]] = []
    for image, boxes_N6 in enumerate(rows):
        for x1, y1, x2, y2, score, label in np.asarray(boxes_N6, np.float64).reshape(-1, 6).tolist():
            annotations.append(
                {
                    "id": len(annotations) + 1,  # 0 means "unmatched" in COCOeval
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "score": score,
                }
            )
    made = COCO()
    made.dataset = {
        "images": [{"id": image} for image in range(len(rows))],
        "categories": [{"id": k} for k in range(classes)],
        "annotations": annotations,
    }
    made.createIndex()
    return made


def scene(seed: int, images: int = 12, most: int = 8, tied: bool = True) -> Scene:
    """Make labels of all sizes, and detections that are shifted, doubled, of a wrong class or invented. Some scores are equal."""
    generator = np.random.default_rng(seed)
    truths, found = [], []
    for _ in range(images):
        count = int(generator.integers(0, most))
        corner = generator.uniform(0, SIDE / 2, (count, 2))
        boxes = np.column_stack([corner, corner + np.exp(generator.uniform(1, 5, (count, 2)))])
        labels = generator.integers(0, len(NAMES), count)
        truths.append(np.column_stack([labels, boxes]).astype(np.float64))
        rows = np.column_stack([boxes, np.zeros(count), labels]).repeat(3, axis=0)
        rows[:, :4] += generator.normal(0, 3, (len(rows), 4)) * generator.integers(0, 2, (len(rows), 1))
        rows[:, 5] = np.where(generator.random(len(rows)) < 0.9, rows[:, 5], generator.integers(0, 3, len(rows)))
        invented = generator.uniform(0, SIDE / 2, (int(generator.integers(0, 5)), 6))
        invented[:, 2:4] += invented[:, :2]
        invented[:, 5] = generator.integers(0, 3, len(invented))
        rows = np.concatenate([rows, invented])
        rows[:, 4] = generator.integers(1, 9, len(rows)) / 10 if tied else generator.random(len(rows))
        found.append(rows.astype(np.float32))
    return truths, found


COORDINATE = st.integers(0, 12)  # a coarse grid: equal boxes, equal IoUs, boxes without area
BOX = st.tuples(COORDINATE, COORDINATE, COORDINATE, COORDINATE)
SCALE = st.sampled_from([1.0, 8.0, 32.0, 0.37])
LABEL = st.integers(0, 2)
SCORE = st.integers(1, 4)


@st.composite
def drawn(draw: Any) -> Scene:
    truths, found = [], []
    for _ in range(draw(st.integers(1, 4))):
        scale = draw(SCALE)
        labelled = draw(st.lists(st.tuples(LABEL, BOX), max_size=6))
        detected = draw(st.lists(st.tuples(BOX, SCORE, LABEL), max_size=10))
        copies = [(box, draw(SCORE), label) for label, box in labelled if draw(st.booleans())]
        truths.append(np.array([(k, *spread(b, scale)) for k, b in labelled], np.float64).reshape(-1, 5))
        rows = [(*spread(b, scale), s / 5, k) for b, s, k in [*detected, *copies]]
        found.append(np.array(rows, np.float32).reshape(-1, 6))
    return truths, found


def spread(box: tuple[int, int, int, int], scale: float) -> tuple[float, float, float, float]:
    x, y, w, h = box
    return x * scale, y * scale, (x + w) * scale, (y + h) * scale
