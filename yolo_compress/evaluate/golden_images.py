"""Golden images: validation images with the detections that engines found in them, and the tolerance for engines elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import DataError
from yolo_compress.evaluate.tolerance import FLOOR, IOU, LEAST_SCORE, MARGIN, Detections, confidence, tolerate
from yolo_compress.runtime.detect.pre import read_image
from yolo_compress.runtime.measure.golden import FILE, MOST, SCHEMA, EngineOf, Golden
from yolo_compress.runtime.secure.signed_manifest import GoldenAbout

MEASURED_IMAGES = 32
ABOUT = (
    "same: tolerance for an engine of the same runtime, version, precision and arithmetic; its worst box and score count. Other "
    f"tolerances are by precision: {MARGIN:g} times the differences between the engines of that precision here, and between them and "
    "the FP32 engines, measured on images_measured images; at least as large as same. For FP32 the worst difference counts, else the "
    f"difference that {MOST} % of the boxes stay below."
)


def sample(dataset: Dataset, count: int) -> tuple[list[int], list[np.ndarray]]:
    """Return validation images that `count` golden images are chosen from, evenly spaced: their indices, and the images."""
    samples = _spread(list(range(len(dataset.val))), max(MEASURED_IMAGES, count))
    return samples, [read_image(dataset.val[index].image) for index in samples]


def write_found(
    folder: Path,
    names: Sequence[str],
    images: Sequence[np.ndarray],
    found: Mapping[str, Detections],
    about: dict[str, EngineOf],
    count: int,
    margin_I: np.ndarray | None = None,
) -> GoldenAbout:
    """Choose golden images, and write them with the detections that engines found in them. Return what was written.

    Args:
        names: Name of each image.
        images: (H, W, 3) uint8 RGB arrays.
        found: `runtime-precision` -> detections in each image: (N, 6) arrays, columns x1, y1, x2, y2 in px, score, class.
        about: The engine of each key of `found`.
        count: Number of images to choose.
        margin_I: For a cascade, the router's margin in each image (`Policy.margin`); 0 where the engines here choose different
            models, which are left out. None: not a cascade.

    Raises:
        DataError: No image has a detection. Or all images of a cascade go to the same model.
    """
    folder.mkdir()
    first = found[min(found, key=_float_first)]
    conf = confidence(first, count)
    chosen = _chosen(first, conf, count) if margin_I is None else _of_both_models(first, conf, count, margin_I)
    expected = {key: [_rows(of_all[i], conf * FLOOR) for i in chosen] for key, of_all in found.items()}
    alike = [i for i in range(len(images)) if margin_I is None or margin_I[i] != 0]
    measured = {key: [of_all[i][of_all[i][:, 4] >= conf * FLOOR] for i in alike] for key, of_all in found.items()}
    boxes = int(sum((first[i][:, 4] >= conf).sum() for i in chosen))
    if not boxes:
        raise DataError(
            f"golden: the model detects nothing above a score of {LEAST_SCORE} in {len(images)} validation images, so the "
            "self-test would pass an engine that detects nothing; train longer, or check the validation images"
        )
    tolerances, differences = tolerate(measured, conf, boxes)
    document: Golden = {
        "schema": SCHEMA,
        "conf": conf,
        "floor": conf * FLOOR,
        "iou": IOU,
        "images": [{"file": f"{n}.npy", "name": names[i]} for n, i in enumerate(chosen)],
        "boxes": boxes,
        "engines": about,
        "tolerances": tolerances,
        "tolerances_from": ABOUT,
        "images_measured": len(alike),
        "measured": differences,
        "expected": expected,
    }
    if margin_I is not None:
        document["handed"] = [bool(margin_I[i] > 0) for i in chosen]
    for number, index in enumerate(chosen):
        np.save(folder / f"{number}.npy", images[index])
    (folder / FILE).write_text(json.dumps(document, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")
    return {"images": len(chosen), "boxes": boxes, "conf": conf, "tolerances": tolerances}


def _rows(found_N6: np.ndarray, floor: float) -> list[list[float]]:
    return [
        [*(round(side, 2) for side in row[:4]), round(row[4], 4), int(row[5])]
        for row in found_N6[found_N6[:, 4] >= floor].tolist()
    ]


def _chosen(found: Detections, conf: float, count: int) -> list[int]:
    """Return the indices of `count` images. Images with a box come first, evenly spaced. Images without a box fill the rest."""
    seen = [i for i, rows in enumerate(found) if (rows[:, 4] >= conf).any()]
    others = [i for i in range(len(found)) if i not in seen]
    return sorted(_spread(seen, count) + _spread(others, max(count - len(seen), 0)))


def _of_both_models(found: Detections, conf: float, count: int, margin_I: np.ndarray) -> list[int]:
    """Return the indices of `count` images, at least 2: half of them go to the large model of a cascade.

    Images with a box come first, then those whose margin is largest: rounding on another processor does not change the choice.
    """
    chosen: list[int] = []
    for model, kind, wanted in (("large", margin_I > 0, count // 2), ("small", margin_I < 0, count - count // 2)):
        images = sorted(np.flatnonzero(kind), key=lambda i: (not (found[i][:, 4] >= conf).any(), -abs(margin_I[i])))
        if not images:
            raise DataError(
                f"golden: of {len(found)} validation images, none has the detections of the cascade's {model} model on all "
                "engines here, so the self-test would not test it; give more validation images, or fit the cascade again"
            )
        chosen += [int(i) for i in images[: max(wanted, 1)]]
    return sorted(chosen)


def _spread(of: list[int], count: int) -> list[int]:
    return of if count >= len(of) else [of[i * len(of) // count] for i in range(count)]


def _float_first(key: str) -> tuple[int, str]:
    return ("fp32", "fp16", "int8").index(key.rpartition("-")[2]), key
