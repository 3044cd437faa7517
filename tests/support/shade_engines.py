"""Two tiny models whose detections follow from the brightness of an image, and a data set for them: each image's gain is known.

An image is evenly grey with one object of 32 x 32 px in its middle. The small model finds the object in a bright image. In a dark image
its box is displaced, with a low score. The large model always finds the object, and is slower because of its larger input.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from yolo_compress.runtime.backends.ort import OrtBackend

SIDE, NAMES = 64, ("bolt", "nut")
SMALL_PX, LARGE_PX = 32, 640
DARK, BRIGHT = 30, 220  # grey levels, 0 to 255


def write_engine(folder: Path, imgsz: int, blind: bool, names: Sequence[str] = NAMES, useful: bool = True) -> Path:
    """Build an ONNX Runtime engine.

    Args:
        blind: whether the model displaces the box in dark images.
        useful: whether a dark image also has a lower score. If not, the detections do not tell that they are wrong.
    """
    folder.mkdir(parents=True)
    scale = imgsz / SIDE
    at_0 = np.zeros((1, 4 + len(names), 4), np.float32)  # for brightness 0; the other anchors stay empty
    slope = np.zeros_like(at_0)
    at_0[0, :4, 1] = np.array([32, 32, 32, 32]) * scale
    at_0[0, 4, 1] = 0.9
    if blind:
        at_0[0, 0, 1], slope[0, 0, 1] = (
            (32 + 17) * scale,
            -17 * 255 / BRIGHT * scale,
        )  # right if bright, 15 px off if dark
        if useful:
            at_0[0, 4, 1], slope[0, 4, 1] = 0.1, 0.9
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0),
            helper.make_node("Unsqueeze", ["mean", "axes"], ["level"]),
            helper.make_node("Mul", ["level", "slope"], ["change"]),
            helper.make_node("Add", ["change", "at_0"], ["output0"]),
        ],
        "shade",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, imgsz, imgsz])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, list(at_0.shape))],
        [
            numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
            numpy_helper.from_array(slope, "slope"),
            numpy_helper.from_array(at_0, "at_0"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"names": str(dict(enumerate(names))), "imgsz": json.dumps([imgsz, imgsz])})
    onnx.save(model, str(folder / "net.onnx"))
    OrtBackend.build(folder / "net.onnx", folder / "engine", "fp32")
    return folder / "engine"


def shade_set(root: Path, train: int, val: int, names: Sequence[str] = NAMES, labels: bool = True) -> Path:
    """Write a data set of which every second image is dark. Return its data yaml."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            level = (DARK if index % 2 else BRIGHT) + generator.integers(-2, 3)
            pixels = level + generator.integers(-2, 3, (SIDE, SIDE, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / split / f"{index}.png")
            row = "0 0.5 0.5 0.5 0.5\n" if labels else ""
            (root / f"labels/{split}/{index}.txt").write_text(row)
    yaml = root / "set.yaml"
    yaml.write_text(f"train: images/train\nval: images/val\nnames: [{', '.join(names)}]\n")
    return yaml
