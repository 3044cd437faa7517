"""Rules on operator sets, on operators that a target does not support, and on layers that no DLA can run."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import NodeProto

from yolo_compress.lint.graph import Graph
from yolo_compress.lint.node import DQ, Q, attribute, name_of
from yolo_compress.lint.rule import WHOLE, Hits, Rule
from yolo_compress.lint.targets import CONVERTED, TENSORRT, Target
from yolo_compress.runtime import registry
from yolo_compress.runtime.errors import EngineError

QDQ_OPSET = 13  # the first with scales per channel, and the minimum that TensorRT documents
INTEGER_OPS = {"DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
TENSORRT_OPS = {"EfficientNMS_TRT", "EfficientNMS_ONNX_TRT", "BatchedNMSDynamic_TRT"}
BODIES = {"If", "Loop", "Scan"}
# TensorRT, "DLA Supported Layers and Restrictions": activations, elementwise of two tensors, convolutions, pools, ...
DLA_OPS = {
    "Conv", "ConvTranspose", "Gemm", "BatchNormalization", "Relu", "Sigmoid", "Tanh", "Clip", "LeakyRelu", "PRelu",
    "Add", "Sub", "Mul", "Max", "Min", "Div", "Pow", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool",
    "ReduceMax", "Resize", "Upsample", "LRN", "Softmax", "Slice", "Split", "Reshape", "Transpose", "Flatten",
    "Squeeze", "Unsqueeze", "Abs", "Sin", "Cos", "Atan", "Equal", "Greater", "Less",
}  # fmt: skip
DLA_KERNEL, DLA_STRIDE = 32, 8


def opset(graph: Graph, target: Target) -> Hits:
    if target.max_opset is not None and graph.opset > target.max_opset:
        yield WHOLE, f"opset {graph.opset}, {target.about} reads up to {target.max_opset}"
    if target.min_opset is not None and graph.opset < target.min_opset:
        yield WHOLE, f"opset {graph.opset}, {target.about} reads from {target.min_opset} on"
    elif graph.opset < QDQ_OPSET and any(node.op_type in (Q, DQ) for node in graph.nodes):
        yield WHOLE, f"opset {graph.opset} with Q/DQ nodes, which need {QDQ_OPSET}"


def checker(graph: Graph, target: Target) -> Hits:
    """Report the first error of onnx's own checker. Unknown operators are left to the rule `operator`."""
    if graph.contradiction:
        yield WHOLE, graph.contradiction
        return
    try:
        onnx.checker.check_model(graph.model)
    except UnicodeDecodeError:
        yield WHOLE, "a string in the file is not UTF-8"
    except onnx.checker.ValidationError as error:
        text = str(error).strip().splitlines()[0]
        if "No Op registered" not in text and "No schema registered" not in text:
            yield WHOLE, text


def refused_by_converter(graph: Graph, target: Target) -> Hits:
    """Find what the converter of this package refuses. It is the list that the conversion itself reads."""
    if graph.contradiction or any(checker(graph, target)):
        return  # the rule `checker` reports it
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    try:
        yield from registry.refusals(target.runtime, model, Path(graph.source))
    except EngineError as error:
        yield WHOLE, str(error).removeprefix(f"{graph.source}: ")
    except (ValueError, TypeError, KeyError, IndexError) as error:
        yield WHOLE, f"an attribute or a shape in it is not as ONNX defines it ({error!r})"


def missing_operators(graph: Graph, target: Target) -> Hits:
    for node in graph.nodes:
        if reason := _missing_reason(graph, node, target):
            yield name_of(node), reason


def _missing_reason(graph: Graph, node: NodeProto, target: Target) -> str | None:
    if target.runtime != "tensorrt":
        return f"{node.op_type} exists only in TensorRT" if node.op_type in TENSORRT_OPS else None
    if node.op_type in INTEGER_OPS or node.domain == "com.microsoft":
        return f"{node.op_type} is ONNX Runtime's form of INT8, not Q/DQ"
    if node.op_type == "EfficientNMS_ONNX_TRT" and target.highest >= (10, 16):
        return "EfficientNMS_ONNX_TRT was removed in 10.16"
    if target.lowest < (8, 4) and node.op_type == "Mod":
        return "Mod is not in TensorRT 8.2"
    if target.lowest < (8, 4) and node.op_type == "TopK" and not graph.is_constant(node.input[1]):
        return "TensorRT 8.2 requires that K of TopK is stored in the file"
    return None


def deprecated_operators(graph: Graph, target: Target) -> Hits:
    for node in graph.nodes:
        if node.op_type == "EfficientNMS_TRT" and target.highest >= (10, 12):
            yield name_of(node), "EfficientNMS_TRT is deprecated since 10.12"


def bodies(graph: Graph, target: Target) -> Hits:
    for node in graph.nodes:
        if node.op_type in BODIES:
            yield name_of(node), f"the graph inside {node.op_type} was not checked"


def layers_off_dla(graph: Graph, target: Target) -> Hits:
    for node in graph.nodes if target.dla else ():
        reason = None if node.op_type in (Q, DQ) else _dla_obstacle(graph, node)
        if reason:
            yield name_of(node), reason


def _dla_obstacle(graph: Graph, node: NodeProto) -> str | None:
    if node.op_type in ("Identity", "Cast", "Dropout"):
        return None
    if node.op_type not in DLA_OPS:
        return f"{node.op_type} has no DLA layer"
    shape = graph.shapes.get(node.output[0])
    if shape is not None and len(shape) != 4:
        return f"{node.op_type} of {len(shape)} dimensions, a DLA supports only 4"
    if node.op_type == "Concat" and attribute(node, "axis", 1) not in (1, -3):
        return f"Concat along axis {attribute(node, 'axis', 1)}, a DLA supports only the channel axis"
    if node.op_type in ("Conv", "ConvTranspose"):
        kernel = (graph.shapes.get(graph.weight(node)) or (0, 0, 1, 1))[2:]
        largest = max((size or 1 for size in kernel), default=1), max(attribute(node, "strides", [1]), default=1)
        if largest[0] > DLA_KERNEL or largest[1] > DLA_STRIDE:
            return f"kernel over {DLA_KERNEL} or stride over {DLA_STRIDE}"
    if node.op_type == "ConvTranspose" and (
        attribute(node, "group", 1) > 1
        or max(attribute(node, "dilations", [1]), default=1) > 1
        or any(attribute(node, "pads", [0]))
    ):
        return "ConvTranspose with groups, dilation or padding"
    return None


def qdq_on_old_dla(graph: Graph, target: Target) -> Hits:
    if target.dla and target.lowest < (10, 0):
        count = sum(node.op_type in (Q, DQ) for node in graph.nodes)
        if count:
            yield WHOLE, f"{count} Q/DQ nodes"


OPERATORS = (
    Rule(
        "opset",
        "error",
        "The parser refuses the file or one of its operators.",
        "Export with another opset: 17 for JetPack 5 to 7, 13 for JetPack 4.6; here: export.opset.",
        opset,
    ),
    Rule(
        "checker",
        "error",
        "The file is not valid ONNX. Runtimes may refuse it or compute wrong results.",
        "Export again with a current exporter, or report the error to its developers.",
        checker,
    ),
    Rule(
        "operator",
        "error",
        "The parser refuses the file.",
        "Export Q/DQ instead of ONNX Runtime's operators. Leave NMS out of the graph, or use NonMaxSuppression.",
        missing_operators,
    ),
    Rule(
        "converter",
        "error",
        "No engine can be built: the converter of this package does not write such a graph.",
        "Export one image size, no NMS in the graph, and activations that it writes; for INT8, the file that `export` writes for "
        "this runtime.",
        refused_by_converter,
        CONVERTED,
    ),
    Rule(
        "operator-deprecated",
        "warning",
        "A later TensorRT will refuse the file.",
        "Leave NMS out of the graph, or use ONNX's NonMaxSuppression (INMSLayer).",
        deprecated_operators,
        TENSORRT,
    ),
    Rule(
        "body",
        "info",
        "Faults inside this graph are not reported.",
        "Export without control flow; a detector with a fixed image size needs none.",
        bodies,
    ),
    Rule(
        "dla-layer",
        "warning",
        "The layer silently falls back to the GPU. Each change of device costs a copy, and a DLA holds at most 16 loadables.",
        "End the graph before the decode of the head, and decode on the CPU or GPU.",
        layers_off_dla,
        TENSORRT,
    ),
    Rule(
        "dla-qdq",
        "error",
        "Up to TensorRT 8.6 the DLA does not support explicit quantisation.",
        "Use the float graph and a calibration cache.",
        qdq_on_old_dla,
        TENSORRT,
    ),
)
