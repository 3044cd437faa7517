"""A small bundle, made without a chain: an untrained model, and the detections of its engine in noise."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from yolo_compress.bundle.make import code
from yolo_compress.evaluate.tolerance import tolerate
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.runtime.backends.base import load_info
from yolo_compress.runtime.backends.ort import OrtBackend
from yolo_compress.runtime.engine import open_engine
from yolo_compress.runtime.measure.golden import FILE, FOLDER, SCHEMA, detections
from yolo_compress.runtime.secure.signed_manifest import seal
from yolo_compress.train import checkpoint

NAMES, IMGSZ = ("bolt", "nut", "screw"), (64, 96)
CONF, FLOOR = 0.0012, 0.0005  # the scores of an untrained model are low


def pictures(count: int = 2) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (60 + 20 * i, 100 + 30 * i, 3), np.uint8) for i in range(count)]


def make_bundle(root: Path) -> Path:
    """Make a sealed bundle with fp32.onnx."""
    code(root_made(root))
    (root / "onnx").mkdir()
    export_onnx(
        checkpoint.new_model("yolov8n.yaml", NAMES, 3, seed=0).eval(), root / "onnx" / "fp32.onnx", IMGSZ, names=NAMES
    )
    OrtBackend.build(root / "onnx" / "fp32.onnx", root.parent / "workstation", "fp32")
    with open_engine(root.parent / "workstation") as engine:
        found = {"onnxruntime-fp32": detections(engine, pictures(), FLOOR, 0.7)}
    info = load_info(root.parent / "workstation")
    (root / FOLDER).mkdir()
    for number, image in enumerate(pictures()):
        np.save(root / FOLDER / f"{number}.npy", image)
    golden: dict[str, Any] = {
        "schema": SCHEMA,
        "conf": CONF,
        "floor": FLOOR,
        "iou": 0.7,
        "images": [{"file": "0.npy", "name": "a"}, {"file": "1.npy", "name": "b"}],
        "engines": {
            "onnxruntime-fp32": {"executed": "fp32", "library": version("onnxruntime"), "onnx_sha256": info.onnx_sha256}
        },
        "tolerances": tolerate(found, CONF, 10)[0],
        "expected": {key: [rows.tolist() for rows in each] for key, each in found.items()},
    }
    (root / FOLDER / FILE).write_text(json.dumps(golden))
    (root / "labels.txt").write_text("\n".join(NAMES) + "\n")
    about = {
        "name": "tiny",
        "target": "plain",
        "names": list(NAMES),
        "imgsz": list(IMGSZ),
        "onnx": {"fp32": "onnx/fp32.onnx"},
    }
    seal(root, about, 3, None)
    return root


def root_made(root: Path) -> Path:
    root.mkdir(parents=True)
    return root
