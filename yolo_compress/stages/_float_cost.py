"""Measure the cost of leaving a group of tensors in float: the GFLOPs of its convolutions, or their latency in FP32 and INT8."""

from __future__ import annotations

import json

import onnx
from torch import nn

from yolo_compress import progress
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.qdq import find_convs, form_of, insert_qdq
from yolo_compress.files.atomic import atomic_write
from yolo_compress.prune import latency
from yolo_compress.prune.cost import conv_shapes
from yolo_compress.quant.plan import Plan
from yolo_compress.quant.ranges import QuantState, fold
from yolo_compress.runtime.measure.layer_times import LAYERS
from yolo_compress.stages import Job

ASKED = "qat.sensitivity_price"


def check(price: str) -> None:
    """Check that the runtime in `price` can run on this machine.

    Args:
        price: Unit of the cost: "gflops", which needs no runtime, or the name of a runtime.

    Raises:
        EnvironmentLacks: The runtime is missing. The message says what to install.
    """
    if price != "gflops":
        latency.require(price, ASKED)


def compute_gflops(model: nn.Module, placed: Plan, imgsz_hw: tuple[int, int]) -> dict[str, float]:
    """Return, for each group of INT8 tensors in `placed`, the GFLOPs of the convolutions that read these tensors."""
    shapes = conv_shapes(model, imgsz_hw)
    return {group.name: 2e-9 * sum(shapes[name].macs for name in group.convs) for group in placed.int8}


def layer_ms(job: Job, model: nn.Module, state: QuantState, runtime: str) -> dict[str, tuple[float, float]]:
    """Time each convolution with its activation on this machine, and return (FP32, INT8) in ms by the convolution's name.

    Two engines are built from the complete model, with the ONNX file that `export` writes for the runtime. They are timed alternately.

    Raises:
        EnvironmentLacks: The runtime is missing.
        CompressError: An engine cannot be built or timed.
    """
    progress.say(f"qat: timing layers on {runtime} in FP32 and INT8")
    folder = job.work / "layers"
    folder.mkdir(exist_ok=True)
    export_onnx(model, folder / "fp32.onnx", job.imgsz_hw, names=job.dataset.names)
    insert_qdq(folder / "fp32.onnx", folder / "int8.onnx", fold(state, model), form_of(runtime))
    shapes = conv_shapes(model, job.imgsz_hw)
    macs = {name: shape.macs for name, shape in shapes.items()}
    nodes = find_convs(onnx.load(str(folder / "fp32.onnx")).graph, state.weights)
    described = {
        "networks": [{"file": f"{name}.onnx", "precision": name, "macs": macs} for name in ("fp32", "int8")],
        "nodes": latency.node_prefixes(folder / "fp32.onnx", shapes),
        "convs": {name: node.name for name, node in nodes.items()},
        "imgsz": list(job.imgsz_hw),
    }
    atomic_write(folder / LAYERS, json.dumps(described) + "\n")
    layers = latency.take_table(folder, runtime, "fp32", ASKED)["layers"]
    return {name: (fp32, int8) for name, ((_, fp32), (_, int8)) in layers.items()}
