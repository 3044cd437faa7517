"""A YOLOv8n with random weights that behaves like a trained model: BatchNorm fits its data, and all biases differ."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, numpy_helper
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.qdq import FORMS, insert_qdq
from yolo_compress.nets import detect
from yolo_compress.prune.graph import prunable, prune
from yolo_compress.quant.ranges import QuantState, fold

NAMES = ("cat", "dog", "robot")
SIZE = (64, 64)


def net(seed: int = 0, yaml: str = "yolov8n.yaml") -> DetectionModel:
    torch.manual_seed(seed)
    model = DetectionModel(yaml, nc=len(NAMES), verbose=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)  # of both signs
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(images(8, seed))
        for branch in detect.class_branches(model):
            branch[-1].bias.normal_(std=2.0)  # class scores away from 0
    return model.eval()


def three_quarters(yaml: str) -> DetectionModel:
    """A net of this architecture, pruned to about three quarters of its channels."""
    model = net(yaml=yaml)
    prune(model, {g.name: torch.arange(max(1, g.steps * 3 // 4) * g.step) for g in prunable(model)})
    return model


def write_forms(model: nn.Module, state: QuantState, folder: Path) -> Path:
    """Write `fp32.onnx` and each INT8 form of it. Return the folder."""
    export_onnx(model, folder / "fp32.onnx", SIZE, names=NAMES)
    for form in FORMS:
        insert_qdq(folder / "fp32.onnx", folder / f"{form}.onnx", fold(state, model), form)
    return folder


def images(count: int, seed: int = 0, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed + 100))


def run_onnx(path: Path, batch: torch.Tensor, optimise: bool = False) -> np.ndarray:
    """Return output0 of ONNX Runtime with one thread. The graph is not optimised unless `optimise` is set."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    fixed = session.get_inputs()[0].shape[0]
    parts = batch.split(fixed) if isinstance(fixed, int) else [batch]
    return np.concatenate([session.run(["output0"], {"images": part.numpy()})[0] for part in parts])


def run_torch(model: nn.Module, batch: torch.Tensor) -> np.ndarray:
    """Return the output from which detections come: [images, 4 + classes, anchors]."""
    if detect.only_trained(model):
        model = copy.deepcopy(model)
        detect.deploy(model)
    with torch.no_grad():
        output = model.eval()(batch)
    return (output if isinstance(output, torch.Tensor) else output[0]).numpy()


def assert_equal_but_for_ties(got: np.ndarray, expected: np.ndarray, expected_float: np.ndarray) -> None:
    """Check that two outputs of one quantised model are equal, [images, 4 + classes, anchors], except for ties in rounding.

    A value on the border of two codes may be rounded to either side, by the processor's order of summation. A model with
    random weights amplifies that for the whole image: in torch, float64 and float32 differ so for one image in four.

    Args:
        got: Output to check.
        expected: Output of another computation of the same quantised model.
        expected_float: Output of the model without quantisation.
    """
    difference, rounding = np.abs(got - expected), np.abs(expected - expected_float)
    assert np.quantile(difference[:, 4:].mean(axis=(1, 2)), 0.25) < 1e-5, "images without such a value are equal"
    for part in (slice(0, 4), slice(4, None)):
        assert difference[:, part].mean() < 0.25 * rounding[:, part].mean()


def in_float32(source: Path, out: Path) -> Path:
    """Write a copy of an ONNX file with float32 in place of float16."""
    model = onnx.load(str(source))
    for stored in model.graph.initializer:
        if stored.data_type == TensorProto.FLOAT16:
            stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored).astype(np.float32), stored.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast":
                attribute.i = TensorProto.FLOAT
    del model.graph.value_info[:]
    onnx.save(model, str(out))
    return out
