"""What the benchmarks of `Detector` run: YOLOv8n on COCO at 640 px as an engine, INT8 by PTQ on coco128 or FP32."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from yolo_compress.data.dataset import Dataset
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.ranges import fold
from yolo_compress.runtime.engine import BACKENDS
from yolo_compress.stages._calibration_images import letterboxed
from yolo_compress.train import checkpoint

CALIB_IMAGES = 64


def build(runtime: str, precision: str, weights: Path, dataset: Dataset, imgsz_px: int, out: Path) -> Path:
    """Export, calibrate, insert Q/DQ, build; returns the engine directory."""
    model, size = checkpoint.load_model(weights), (imgsz_px, imgsz_px)
    out.mkdir(parents=True, exist_ok=True)
    onnx = out / "fp32.onnx"
    export_onnx(model, onnx, size, names=dataset.names)
    if precision == "int8":
        state = fold(ptq(model, partial(letterboxed, dataset.train[:CALIB_IMAGES], size)), model)
        onnx = out / "int8.onnx"
        insert_qdq(out / "fp32.onnx", onnx, state, runtime)
    engine = out / "engine"
    BACKENDS[runtime].build(onnx, engine, precision)
    return engine
