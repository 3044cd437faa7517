"""What the benchmarks of `Detector` run: YOLOv8n on COCO at 640 px as an engine, INT8 by PTQ on coco128 or FP32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from yolo_compress import ultra
from yolo_compress.data import Dataset
from yolo_compress.export_onnx import export_onnx
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.qdq import insert_qdq
from yolo_compress.quant.state import fold
from yolo_compress.runtime.engine import BACKENDS
from yolo_compress.runtime.pre import letterbox, read_image

CALIB_IMAGES = 64


def build(runtime: str, precision: str, weights: Path, dataset: Dataset, imgsz_px: int, out: Path) -> Path:
    """Export, calibrate, insert Q/DQ, build; returns the engine directory."""
    model, size = ultra.load_model(weights), (imgsz_px, imgsz_px)
    out.mkdir(parents=True, exist_ok=True)
    onnx = out / "fp32.onnx"
    export_onnx(model, onnx, size, names=dataset.names)
    if precision == "int8":
        images = [letterbox(read_image(s.image), size)[0] for s in dataset.train[:CALIB_IMAGES]]
        batches = [torch.from_numpy(np.stack(images[i : i + 8])) for i in range(0, len(images), 8)]
        state = fold(ptq(model, lambda: batches), model)
        onnx = out / "int8.onnx"
        insert_qdq(out / "fp32.onnx", onnx, state, runtime)  # type: ignore[arg-type]
    engine = out / "engine"
    BACKENDS[runtime].build(onnx, engine, precision)
    return engine
