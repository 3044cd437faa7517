"""Find the first layer whose output in an exported graph differs from its output in the torch model."""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from yolo_compress.nets.eval_mode import evaluating
from yolo_compress.runtime.backends.ort import open_session

MAX_ROUNDINGS = 10.0  # tolerance in multiples of the float32 rounding error, because ONNX Runtime sums in another order
LEAST = 1e-5  # minimum tolerance, relative to the largest value of the layer; float32 sums are not more exact


def first_bad_layer(model: nn.Module, file: Path, images_BCHW: np.ndarray) -> str:
    """Compare the outputs of a torch model and its ONNX file layer by layer, and describe the first layer that differs.

    Args:
        model: A detector in float32. `model.model` holds its layers. The model is not changed.
        file: The model's FP32 ONNX file. The exporter names nodes after layers (`/model.4/cv1/conv/Conv`).
        images_BCHW: Float32 in 0..1. The batch size must equal the batch size of the file.

    Returns:
        Text such as "model.4 (C2f), by 0.12 of 3.1": the layer, the largest difference, and the largest value. If only the head
        differs, the text names the head.
    """
    exact, images = copy.deepcopy(model).double(), torch.from_numpy(images_BCHW)
    rounded, exactly = _outputs(model, images), _outputs(exact, images.double())
    onnx_outputs = _onnx_outputs(file, images_BCHW)
    layers = list(model.model)  # type: ignore[arg-type]
    for index, layer in enumerate(layers[:-1]):
        if index not in onnx_outputs:  # onnxsim merged it into another layer
            continue
        largest = float(exactly[index].abs().max())
        rounding = float((rounded[index].double() - exactly[index]).abs().max())
        difference = float((torch.from_numpy(onnx_outputs[index]).double() - exactly[index]).abs().max())
        if not difference <= max(LEAST * largest, MAX_ROUNDINGS * rounding):  # true for NaN too
            return f"model.{index} ({type(layer).__name__}), by {difference:.2g} of {largest:.2g}"
    return f"model.{len(layers) - 1} ({type(layers[-1]).__name__}), all before it agree"


def _outputs(model: nn.Module, images: Tensor) -> dict[int, Tensor]:
    """Return a dict from the index of a layer in the torch model to the layer's output. The head is left out."""
    found: dict[int, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, __, output, index=index: found.update({index: output.detach().clone()}))
        for index, layer in enumerate(list(model.model)[:-1])  # type: ignore[arg-type]
    ]
    try:
        with torch.no_grad(), evaluating(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _onnx_outputs(file: Path, images_BCHW: np.ndarray) -> dict[int, np.ndarray]:
    """Return a dict from the index of a layer to the output of the layer's last ONNX node."""
    graph = onnx.load(str(file))
    last = {
        int(found[1]): node.output[0] for node in graph.graph.node if (found := re.match(r"/model\.(\d+)/", node.name))
    }
    known = {output.name for output in graph.graph.output}
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in last.values() if name not in known)
    with tempfile.TemporaryDirectory() as folder:
        watched = Path(folder) / file.name
        onnx.save(graph, str(watched))
        session = open_session(watched, threads=1)
        values = session.run(list(last.values()), {session.get_inputs()[0].name: images_BCHW})
    return dict(zip(last, values, strict=True))
