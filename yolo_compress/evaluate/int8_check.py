"""Check that an INT8 engine computes what its ONNX file says, on real images.

The runtime's kernels round differently from ONNX nodes run one by one, so boxes differ a little. They may differ by no more than twice
what INT8 itself changes: the difference between the file and the float file of the same model (`tolerance.tolerate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from yolo_compress.evaluate.exported_files import Simulated
from yolo_compress.evaluate.tolerance import FLOOR, IOU, LEAST_SCORE, Detections, confidence, tolerate
from yolo_compress.runtime.backends.base import Backend, EngineInfo
from yolo_compress.runtime.backends.ort import OrtBackend
from yolo_compress.runtime.files import sha256_file
from yolo_compress.runtime.measure.golden import beyond, detections, difference
from yolo_compress.runtime.measure.int8_file import Check


def int8_check(files: Iterable[Path], float_file: Path, images: Sequence[np.ndarray]) -> Check:
    """Return a function that compares an engine with the ONNX file that it was built from. It returns what is wrong, or None.

    Args:
        files: INT8 ONNX files that engines are built from.
        float_file: ONNX file of the same model in FP32.
        images: (H, W, 3) uint8 RGB arrays.
    """
    file_by_sha256 = {sha256_file(file): file for file in files}

    @cache
    def in_float() -> Detections:
        with OrtBackend(float_file) as backend:
            return detections(backend, images, LEAST_SCORE, IOU)

    @cache
    def node_by_node(file: Path) -> Detections:
        with Simulated(file, "int8", file.name) as backend:
            return detections(backend, images, LEAST_SCORE, IOU)

    def check(engine: Backend, info: EngineInfo) -> str | None:
        expected = node_by_node(file_by_sha256[info.onnx_sha256])
        conf = confidence(expected, len(images))
        kept = {
            key: [rows[rows[:, 4] >= conf * FLOOR] for rows in each]
            for key, each in {
                "file-int8": expected,
                "float-fp32": in_float(),
                "engine": detections(engine, images, LEAST_SCORE, IOU),
            }.items()
        }
        found = kept.pop("engine")
        boxes = sum(int((rows[:, 4] >= conf).sum()) for rows in expected)
        return beyond(difference(kept["file-int8"], found, conf), tolerate(kept, conf, boxes)[0]["int8"])

    return check
