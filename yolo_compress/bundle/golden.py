"""Golden images for the self-test of a bundle: validation images, expected detections, and tolerances.

Each engine of the compressed model makes its own expected detections, on the machine that makes the bundle. If the runtime of an
INT8 file is not installed there, the ONNX file is executed node by node. A robot may use another runtime or arithmetic. So the
tolerance is twice the difference between the engines on that machine, measured on up to 32 images. `golden.json` also has the
measured differences.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import DataError
from yolo_compress.evaluate.exported_files import made_for, open_exported
from yolo_compress.evaluate.rows import engine_rows
from yolo_compress.evaluate.tolerance import FLOOR, IOU, LEAST_SCORE, MARGIN, Detections, confidence, tolerate
from yolo_compress.runtime.backends.base import load_info
from yolo_compress.runtime.detect.pre import read_image
from yolo_compress.runtime.engine import BACKENDS, open_engine
from yolo_compress.runtime.files import sha256_file
from yolo_compress.runtime.measure.golden import (
    FILE,
    MOST,
    SCHEMA,
    EngineOf,
    Golden,
    detections,
)
from yolo_compress.runtime.secure.signed_manifest import GoldenAbout
from yolo_compress.store.manifest import Artifact

MEASURED_IMAGES = 32
ABOUT = (
    "same: tolerance for an engine of the same runtime, version, precision and arithmetic; its worst box and score count. Other "
    f"tolerances are by precision: {MARGIN:g} times the differences between the engines of that precision here, and between them and "
    "the FP32 engines, measured on images_measured images; at least as large as same. For FP32 the worst difference counts, else the "
    f"difference that {MOST} % of the boxes stay below."
)


def write(folder: Path, dataset: Dataset, export: Artifact, engines: Artifact, count: int) -> GoldenAbout:
    """Write the golden images and `golden.json` into `folder`. Return a summary of both for the manifest.

    Args:
        folder: Folder to make.
        dataset: Data set. Golden images are taken from its validation images.
        export: Artefact of the stage `export`.
        engines: Artefact of the stage `engine`.
        count: Number of golden images.

    Raises:
        DataError: The compressed model detects nothing, so engines cannot be compared.
    """
    folder.mkdir()
    samples = _spread(list(range(len(dataset.val))), max(MEASURED_IMAGES, count))
    images = [read_image(dataset.val[index].image) for index in samples]
    found, about = _detected(export, engines, images)
    first = found[min(found, key=_float_first)]
    conf = confidence(first, count)
    chosen = _chosen(first, conf, count)
    expected = {key: [_rows(of_all[i], conf * FLOOR) for i in chosen] for key, of_all in found.items()}
    measured = {key: [rows[rows[:, 4] >= conf * FLOOR] for rows in of_all] for key, of_all in found.items()}
    boxes = int(sum((first[i][:, 4] >= conf).sum() for i in chosen))
    if not boxes:
        raise DataError(
            f"golden: the compressed model detects nothing above a score of {LEAST_SCORE} in {len(images)} validation images, so the "
            "self-test would pass an engine that detects nothing; train longer, or check the validation images"
        )
    tolerances, differences = tolerate(measured, conf, boxes)
    document: Golden = {
        "schema": SCHEMA,
        "conf": conf,
        "floor": conf * FLOOR,
        "iou": IOU,
        "images": [{"file": f"{n}.npy", "name": dataset.val[samples[i]].name} for n, i in enumerate(chosen)],
        "boxes": boxes,
        "engines": about,
        "tolerances": tolerances,
        "tolerances_from": ABOUT,
        "images_measured": len(images),
        "measured": differences,
        "expected": expected,
    }
    for number, index in enumerate(chosen):
        np.save(folder / f"{number}.npy", images[index])
    (folder / FILE).write_text(json.dumps(document, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")
    return {"images": len(chosen), "boxes": boxes, "conf": conf, "tolerances": tolerances}


def _detected(
    export: Artifact, engines: Artifact, images: Sequence[np.ndarray]
) -> tuple[dict[str, Detections], dict[str, EngineOf]]:
    """Run each engine of the compressed model on the images. Return two dicts with the key `runtime-precision`.

    The first dict has the detections, the second the arithmetic and library of each engine. If the runtime of an INT8 file is not
    installed here, the ONNX file is executed node by node.
    """
    found, about = dict[str, Detections](), dict[str, EngineOf]()
    for row in engine_rows(engines):
        if row["model"] == "compressed" and not row["reason"]:
            key = f"{row['runtime']}-{row['precision']}"
            with open_engine(engines.path / row["folder"]) as engine:
                found[key] = detections(engine, images, LEAST_SCORE, IOU)
                info = load_info(engines.path / row["folder"])
                about[key] = {
                    "executed": engine.executed,
                    "library": info.library,
                    "onnx_sha256": info.onnx_sha256,
                }
    for file in sorted(export.manifest.files):
        target = made_for(file) if file.startswith("compressed/") else None
        if target and target.precision == "int8" and target.runtime in BACKENDS:
            key = f"{target.runtime}-{target.precision}"
            if key not in found:
                with ExitStack() as stack:
                    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                    simulated = stack.enter_context(open_exported(export.file(file), target.precision, scratch))
                    found[key] = detections(simulated, images, LEAST_SCORE, IOU)
                    about[key] = {
                        "executed": simulated.executed,
                        "library": "none",
                        "onnx_sha256": sha256_file(export.file(file)),
                    }
    return found, about


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


def _spread(of: list[int], count: int) -> list[int]:
    return of if count >= len(of) else [of[i * len(of) // count] for i in range(count)]


def _float_first(key: str) -> tuple[int, str]:
    return ("fp32", "fp16", "int8").index(key.rpartition("-")[2]), key
