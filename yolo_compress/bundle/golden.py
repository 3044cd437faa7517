"""Golden images for the self-test of a bundle: validation images, expected detections, and tolerances.

Each engine of the compressed model makes its own expected detections, on the machine that makes the bundle. If the runtime of an
INT8 file is not installed there, the ONNX file is executed node by node. A robot may use another runtime or arithmetic. So the
tolerance is twice the difference between the engines on that machine, measured on up to 32 images. `golden.json` also has the
measured differences.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from yolo_compress.data.dataset import Dataset
from yolo_compress.evaluate.exported_files import made_for, open_exported
from yolo_compress.evaluate.golden_images import sample, write_found
from yolo_compress.evaluate.rows import engine_rows
from yolo_compress.evaluate.tolerance import IOU, LEAST_SCORE, Detections
from yolo_compress.runtime.backends.base import load_info
from yolo_compress.runtime.engine import BACKENDS, open_engine
from yolo_compress.runtime.files import sha256_file
from yolo_compress.runtime.measure.golden import (
    EngineOf,
    detections,
)
from yolo_compress.runtime.secure.signed_manifest import GoldenAbout
from yolo_compress.store.manifest import Artifact


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
    samples, images = sample(dataset, count)
    return write_found(
        folder, [dataset.val[index].name for index in samples], images, *_detected(export, engines, images), count
    )


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
