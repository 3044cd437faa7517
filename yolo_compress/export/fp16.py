"""Convert an ONNX graph to FP16 tensors, as TensorRT 11 requires, with float32 input and output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from yolo_compress.errors import NumericsError
from yolo_compress.export.float_onnx import write_metadata

FP16_MAX = 65504.0
FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16


def decode_tail(graph: onnx.GraphProto) -> list[str]:
    """Return the names of the nodes after the head's output convolutions: DFL, box decode, sigmoid.

    No convolution follows these nodes, since `export_onnx` writes DFL as sums.
    """
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    before: set[str] = set()
    tail = []
    for node in reversed(graph.node):
        followers = [user for output in node.output for user in consumers.get(output, [])]
        feature = any(user.name in before or user.op_type == "Conv" for user in followers)
        if feature or node.op_type == "Conv":
            before.add(node.name)
        else:
            tail.append(node.name)
    return tail[::-1]


def to_fp16(float_onnx: Path, out: Path, precision: str = "fp16") -> None:
    """Convert an ONNX file to float16 weights and activations. Input `images` and output `output0` stay float32.

    Q/DQ nodes are converted too. The box decode after the head's output convolutions stays float32. Above 512, float16 has steps of
    0.5, so a box at 600 px would move by a quarter of a pixel.

    ONNX Runtime's own converter (1.32) is not used, because it rounds the boxes: it casts to float16 and back between nodes that
    stay float32. The graph written here has one cast after the input, and one after each output convolution.

    Args:
        float_onnx: File written by `export_onnx`, or by `qdq.insert_qdq` for "tensorrt11". It is only read.
        out: File to write.
        precision: Precision for the metadata, "int8" for a graph with Q/DQ nodes.

    Raises:
        NumericsError: A weight exceeds the range of float16.
    """
    model = onnx.load(str(float_onnx))
    graph = model.graph
    _constants_to_initializers(graph)
    tail = set(decode_tail(graph))
    floats = {item.name: item for item in graph.initializer if item.data_type == TensorProto.FLOAT}
    halves: dict[str, str] = {}
    for node in graph.node:
        if node.name not in tail:
            for index, name in enumerate(node.input):
                # roi and scales of Resize must be float32
                if name in floats and not (node.op_type == "Resize" and index > 0):
                    if name not in halves:
                        halves[name] = f"{name}_fp16"
                        graph.initializer.append(_to_half(floats[name], halves[name], float_onnx))
                    node.input[index] = halves[name]
    _insert_casts(graph, tail)
    used = {name for node in graph.node for name in node.input}
    used_initializers = [item for item in graph.initializer if item.name in used]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(used_initializers)
    write_metadata(model, {"precision": precision})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(out))


def _to_half(tensor: TensorProto, name: str, source: Path) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= FP16_MAX:
        raise NumericsError(
            f"{source}: {tensor.name} reaches {largest:g}, the largest float16 is {FP16_MAX:g}; leave fp16 out of "
            "export.precisions"
        )
    return numpy_helper.from_array(values.astype(np.float16), name)


def _insert_casts(graph: onnx.GraphProto, tail: set[str]) -> None:
    """Insert casts to float16 after the graph's inputs, and to float32 before the nodes of `tail`, in place."""
    graph_inputs = {item.name for item in graph.input}
    nodes: list[onnx.NodeProto] = []
    for item in graph.input:
        nodes.append(helper.make_node("Cast", [item.name], [f"{item.name}_fp16"], f"{item.name}_fp16", to=FLOAT16))
    produced = {name for node in graph.node if node.name not in tail for name in node.output}
    cast: dict[str, str] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if node.name not in tail and name in graph_inputs:
                node.input[index] = f"{name}_fp16"
            elif node.name in tail and name in produced:
                if name not in cast:
                    cast[name] = f"{name}_fp32"
                    nodes.append(helper.make_node("Cast", [name], [cast[name]], cast[name], to=FLOAT))
                node.input[index] = cast[name]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Replace Constant nodes by initializers, in place. `to_fp16` then recognises constant inputs of nodes."""
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        (value,) = node.attribute
        if value.name == "value":
            tensor = graph.initializer.add()
            tensor.CopyFrom(value.t)
            tensor.name = node.output[0]
            graph.node.remove(node)
